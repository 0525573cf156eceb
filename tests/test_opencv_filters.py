"""Tests of resizing as OpenCV does it, against what OpenCV 5.0.0 gave, and of what it is said to cost."""

import tracemalloc

import numpy as np
import pytest

from ebjdat_serve.contract import Input
from ebjdat_serve.errors import BundleError
from ebjdat_serve.opencv_filters import FILTERS, resize
from ebjdat_serve.pixels import decode, encode_png

IMAGE = (np.arange(6 * 7 * 3).reshape(6, 7, 3) * 37 % 256).astype(np.uint8)
OPENCV = {  # cv2.resize(IMAGE, (4, 3))[..., 1] and cv2.resize(IMAGE, (4, 9))[:, 2, 0]
    "opencv-linear": (
        [[83, 21, 216, 154], [101, 39, 234, 172], [119, 57, 28, 190]],
        [174, 179, 184, 190, 197, 202, 208, 215, 219],
    ),
    "opencv-cubic": (
        [[90, 7, 229, 145], [109, 25, 255, 162], [128, 47, 0, 201]],
        [185, 189, 196, 201, 208, 215, 222, 230, 234],
    ),
    "opencv-lanczos": (
        [[97, 0, 239, 137], [116, 17, 255, 152], [137, 49, 0, 214]],
        [184, 188, 195, 201, 205, 214, 228, 238, 241],
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_pixels_are_opencvs(name):
    smaller, taller = OPENCV[name]
    most = 0 if name == "opencv-lanczos" else 1  # for the others OpenCV's vector code sums in another order
    assert np.abs(resize(IMAGE, 3, 4, name)[..., 1].astype(int) - smaller).max() <= most
    assert np.abs(resize(IMAGE, 9, 4, name)[:, 2, 0].astype(int) - taller).max() <= most


def test_a_contract_resizes_by_them():
    found = decode(encode_png(IMAGE), Input(3, 4, "squash", "opencv-lanczos"))
    np.testing.assert_array_equal(found, resize(IMAGE, 3, 4, "opencv-lanczos"))
    assert not np.array_equal(found, decode(encode_png(IMAGE), Input(3, 4, "squash", "lanczos")))


def test_a_filter_that_is_none_is_refused():
    with pytest.raises(BundleError, match="is no filter of OpenCV's: opencv-linear"):
        resize(IMAGE, 3, 4, "lanczos")


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("size", [(1500, 2000), (300, 250), (3000, 60)])
def test_it_takes_no_more_memory_than_is_said(name, size):
    contract = Input(224, 224, "cover", name, 0.875)
    image = np.zeros((*size, 3), np.uint8)
    tracemalloc.start()
    resize(image, *contract.resized(*size), name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < contract.cost(*size).memory
