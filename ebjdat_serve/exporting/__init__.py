"""Write a torch network's graphs into a bundle, and compare them with it; needs torch, onnx and onnxscript, and the server never does."""
