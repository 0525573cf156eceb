// Drives the page in a headless Chromium and prints its results as one line of JSON:
//   node check.mjs BUNDLE IMAGE [--chains FILE] [--steps 5] [--draw 12] [--rounds 30] [--shots FOLDER]
// FILE is {label, z, chains}: the normals `z` that a chain of `label` starts from, and chains as flat arrays named as in the step graph.
// Needs Node.js 20; CHROMIUM names the browser (default /usr/bin/chromium).
// Exit code 1: an error on the page or its console, a failed request, or a request to another host.
import { createServer } from 'node:http';
import { readFile } from 'node:fs/promises';
import { extname, join, normalize } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { chromium } from 'playwright-core';

const { values: options, positionals: [bundle, image] } = parseArgs({
  allowPositionals: true,
  options: {
    chains: { type: 'string' },
    steps: { type: 'string', default: '5' },
    draw: { type: 'string', default: '12' },
    rounds: { type: 'string', default: '30' },
    shots: { type: 'string' },
  },
});
if (!image) {
  console.error('usage: node check.mjs BUNDLE IMAGE [--chains FILE] [--steps 5] [--draw 12] [--rounds 30] [--shots FOLDER]');
  process.exit(2);
}
const HERE = fileURLToPath(new URL('.', import.meta.url));
const TYPES = { '.html': 'text/html', '.js': 'text/javascript', '.mjs': 'text/javascript', '.json': 'application/json', '.wasm': 'application/wasm' };
const QUIET = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update',
  '--disable-sync', '--no-proxy-server', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1'];

const served = {}; // path: bytes
const server = createServer(async (request, answer) => {
  const path = normalize(decodeURIComponent(new URL(request.url, 'http://localhost').pathname)); // no .. is left
  const file = path.startsWith('/bundle/') ? join(bundle, path.slice(8)) : join(HERE, path);
  try {
    const body = await readFile(file);
    served[path] = (served[path] ?? 0) + body.length;
    answer.writeHead(200, { 'content-type': TYPES[extname(file)] ?? 'application/octet-stream' }).end(body);
  } catch {
    answer.writeHead(404).end();
  }
});

/** Runs in the page, with the functions that its buttons use. */
async function compute({ given, steps, draw, rounds }) {
  const { classify, advance, start, place } = window.ebjdat;
  const integers = new Set(['label', 'key', 'step']);
  const typed = ([name, list]) => [name, integers.has(name) ? BigInt64Array.from(list, BigInt) : Float32Array.from(list)];
  const begun = given ? Object.fromEntries(Object.entries(given.chains).map(typed)) : await start(0, 0);
  const { chains, energies } = await advance(begun, steps);
  const one = await start(0, 0), again = await start(0, 0), other = await start(0, 1);
  const time = async act => { // ms; on a busy machine the fastest is the most reliable
    const times = [];
    for (let round = -3; round < rounds; round++) {
      const begin = performance.now();
      await act();
      if (round >= 0) times.push(performance.now() - begin);
    }
    times.sort((a, b) => a - b);
    return { fastest: times[0], median: times[rounds >> 1] };
  };
  const equal = (a, b) => ['image', 'key'].map(name => a[name].every((value, i) => value === b[name][i]));
  return {
    image: [...chains.image],
    step: Array.from(chains.step, Number),
    energies: energies.map(row => [...row]),
    redrawn: [...(await advance(await start(1, 0), draw)).chains.image], // the image drawn on the canvas before
    place: given ? [...await place(given.label, Float32Array.from(given.z))] : [...one.image],
    seeds: { same: equal(one, again), other: equal(one, other) },
    timing: { classify_ms: await time(() => classify(one.image, 1)), step_ms: await time(() => advance(one, 1)), threads: 1, rounds },
  };
}

const given = options.chains && JSON.parse(await readFile(options.chains, 'utf8'));
await new Promise(done => server.listen(0, '127.0.0.1', done));
const origin = `http://127.0.0.1:${server.address().port}`;
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', headless: true, args: QUIET });
const wrong = [];
try {
  const page = await browser.newPage({ viewport: { width: 980, height: 760 } });
  page.setDefaultTimeout(60_000);
  page.on('console', message => message.type() === 'error' && wrong.push(`console: ${message.text()}`));
  page.on('pageerror', error => wrong.push(`uncaught: ${error.message}`));
  page.on('requestfailed', request => wrong.push(`failed: ${request.url()} ${request.failure()?.errorText}`));
  page.on('response', response => response.status() >= 400 && wrong.push(`HTTP ${response.status()}: ${response.url()}`));
  await page.route(url => url.origin !== origin, route => { wrong.push(`another host: ${route.request().url()}`); return route.abort(); });
  const shoot = async name => options.shots && page.screenshot({ path: join(options.shots, `${name}.png`), fullPage: true });
  const until = async start => {
    await page.waitForFunction(text => document.querySelector('#status.bad') ?? document.querySelector('#status').textContent.startsWith(text), start);
    const status = page.locator('#status');
    if (await status.evaluate(element => element.className === 'bad')) throw new Error(`the page says: ${await status.textContent()}`);
  };

  await page.goto(`${origin}/index.html`);
  await until('Ready');
  const text = selector => page.locator(selector).textContent();
  const rgba = canvas => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data];
  const pixels = selector => page.locator(selector).evaluate(rgba);

  await page.setInputFiles('#file', image);
  await until('Classified');
  const seen = await pixels('#seen');
  const classified = await page.evaluate(async rgba => {
    const area = rgba.length / 4, image = Float32Array.from({ length: 3 * area }, (_, i) => rgba[i % area * 4 + Math.floor(i / area)] / 255);
    const said = await window.ebjdat.classify(image, 1);
    return { logits: [...said.logits], energy: [...said.energy ?? []] };
  }, seen);
  const shown = {};
  for (const name of ['label', 'probability', 'energy', 'p_value', 'suspicious']) shown[name] = await text(`#${name}`);

  const draws = await page.locator('#draw').isEnabled();
  if (draws) {
    await page.selectOption('#class', '1');
    await page.fill('#steps', options.draw);
    await page.click('#draw');
    await until('Drew');
  }
  const drawn = { first: Number(await text('#first')), last: Number(await text('#now')), taken: await text('#taken'), pixels: await pixels('#drawn'),
    verdict: await text('#verdict') };
  await shoot('light');
  await page.emulateMedia({ colorScheme: 'dark' });
  await shoot('dark');

  const computed = draws && await page.evaluate(compute, { given, steps: Number(options.steps), draw: Number(options.draw), rounds: Number(options.rounds) });
  if (wrong.length) throw new Error(wrong.join('\n'));
  console.log(JSON.stringify({ browser: browser.version(), seen, classified, shown, drawn, ...computed, downloads: served }));
} catch (error) {
  console.error([error.message, ...wrong].join('\n'));
  process.exitCode = 1;
} finally {
  await browser.close();
  server.close();
}
