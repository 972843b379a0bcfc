"""From what a detector gives to what is scored and shown."""

import torch

from detection.evaluate import describe, finite, in_original, per_class
from detection.pictures import draw

NAN = float("nan")


def objects(boxes, scores=None) -> dict[str, torch.Tensor]:
    boxes = torch.tensor(boxes, dtype=torch.float32)
    scores = torch.ones(len(boxes)) if scores is None else torch.tensor(scores)
    return {"boxes": boxes, "scores": scores, "labels": torch.arange(len(boxes))}


def test_boxes_go_back_to_the_original():
    """An image of 100 x 50 (width, height) that was halved, below a border of 10 pixels, in 64 x 64."""
    geometry = torch.tensor([0.5, 0.5, 0.0, 10.0])
    found = objects([[5, 15, 20, 30], [-3, 2, 60, 70], [0, 0, 50, 10], [0, 36, 50, 64]])
    expected = [[10, 10, 40, 40], [0, 0, 100, 50]]  # the others are in the border
    kept = in_original(found, geometry, (50, 100))
    assert kept["boxes"].tolist() == expected and kept["labels"].tolist() == [0, 1]


def test_what_is_not_a_number_does_not_count():
    found = finite(objects([[0, 0, 1, 1], [0, 0, NAN, 1], [0, 0, 2, 2]], [NAN, 0.5, 0.25]))
    assert found["labels"].tolist() == [2] and found["scores"].tolist() == [0.25]


def test_results_for_people():
    summary = {"AP": 0.25, "AP50": 0.5, "AP75": 0.125, "AP_small": NAN, "AP_medium": 0.0, "AP_large": 1.0}
    metrics = {**summary, "AP/cat": NAN, "AP/dog": 0.5, "AP/owl": 0.75}
    metrics |= {"images": 7, "unreadable_val": 1, "val_images_per_second": 3.0}
    assert describe(metrics) == (
        "AP 0.250 (AP50 0.500, AP75 0.125; small -, medium 0.000, large 1.000) on 7 images, of which 1 unreadable and "
        "counted as empty, 3 images/s"
    )
    assert list(per_class(metrics)) == ["owl", "dog", "cat"]


def test_drawn_boxes():
    image = torch.zeros(3, 32, 32)
    drawn = draw(image, objects([[4, 4, 20, 20], [2, 24, 30, 30], [9, 9, 5, 5]], [0.9, 0.1, 0.9]), "abc", "red")
    assert drawn[:, 4, 4].tolist() == [1, 0, 0]
    assert not drawn[:, 24:].any() and not image.any()  # too unlikely; the image itself is as it was
    assert torch.equal(draw(image, objects([]) | {"boxes": torch.empty(0, 4)}, "abc", "red"), image)
