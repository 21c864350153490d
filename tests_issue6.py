# ------------------------------------------------------------------------------- transfer to detection (issue 6, section 5.2)
# The C4 detectors of evaluate.py: what is transferred, what is trained, VOC's AP against hand-worked cases and a plain
# loop, COCO's on perfect answers, resumption after kill -9, two ranks, a fit of a few images, mistakes.
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

import data as d
import evaluate as e
from augment import normalise
from d3ssl import Encoder, Ranks

HERE = Path(__file__).resolve().parent
LOOK = "--ckpt random --arch resnet18 --transfer coco --short-side 64 --batch-size 2 --rois 8 --workers 0 --resume auto".split()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Eight train scenes and two val scenes in COCO's layout, with masks."""
    root = tmp_path_factory.mktemp("scenes")
    d.write_scenes(root, 8)
    return root


def detection_run(capfd, *arguments):
    """evaluate.py --transfer in this process, which saves the imports: (exit code, stdout, stderr)."""
    old, sys.argv = sys.argv, ["evaluate.py", *LOOK, *map(str, arguments)]
    capfd.readouterr()
    try:
        d.error_exit(e.main)
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = old
    return (code, *capfd.readouterr())


def fine_tuning(root, out, **settings):
    """A FineTuning of a tiny run, in this process."""
    settings = {**dict(steps=4, drops=(3,), warmup=1, sides=(64,), long_side=107, batch_size=2, rois=8, precise=2), **settings}
    network = e.load_backbone("random", "resnet18")[0]
    return e.FineTuning(e.Transfer("coco", str(root), "random", "resnet18", **settings), network, Ranks(), out)


def randomise_norms(module):
    """Batch norm statistics that a trained network could have, so that eval mode is not the identity."""
    generator = torch.Generator().manual_seed(3)
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.copy_(0.1 * torch.randn(norm.num_features, generator=generator))
            norm.running_var.copy_(0.5 + torch.rand(norm.num_features, generator=generator))


def test_transfer_is_of_the_pretrained_object_feature():
    """Item 4: before the extra norm, in eval mode, the detector's RoI feature is the encoder's C5 feature of that box."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18").eval()
    randomise_norms(encoder)
    image = torch.rand(3, 96, 128)
    boxes = torch.tensor([[3.5, 8.2, 60.1, 70.9], [40.0, 0.0, 128.0, 96.0], [70.3, 33.3, 90.6, 41.7]])
    with torch.no_grad():
        expected = encoder.backbone.layer4(encoder.pool(encoder.c4(normalise(image[None])), boxes[None])).mean((2, 3))
        model = e.c4_detector(encoder.backbone, 5, sides=(96,)).eval()
        pixels = model.transform([image])[0].tensors
        found = model.roi_heads.box_head.layer4(model.roi_heads.box_roi_pool({"0": model.backbone(pixels)}, [boxes], None))
    assert expected.std() > 0.01
    torch.testing.assert_close(found.mean((2, 3)), expected, rtol=1e-4, atol=1e-5)


def test_c4_detector_is_moco_s_c4():
    model = e.c4_detector(e.build("resnet50", 0), 80, masks=True)
    assert model.backbone.out_channels == 1024 and model.rpn.head.cls_logits.out_channels == 15
    assert model.roi_heads.box_predictor.cls_score.weight.shape == (81, 2048)
    assert model.roi_heads.mask_predictor.conv5_mask.weight.shape == (2048, 256, 2, 2)
    assert all(p.requires_grad for p in model.parameters())  # nothing frozen
    anchors = model.rpn.anchor_generator.cell_anchors[0] if model.rpn.anchor_generator.cell_anchors else None
    sides = ((anchors[:, 2] - anchors[:, 0]) * (anchors[:, 3] - anchors[:, 1])).sqrt()
    assert sorted({32 * 2 ** round(math.log2(side / 32)) for side in sides.tolist()}) == [32, 64, 128, 256, 512]


def test_masks_train_on_the_box_head_s_own_map():
    """One pass through res5 a step: the norms see the sampled boxes once, and the mask head gets its objects' rows."""
    torch.manual_seed(0)
    model = e.c4_detector(e.build("resnet18", 0), 4, masks=True, sides=(64,), rois=8).train()
    seen = []
    model.roi_heads.mask_predictor.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    masks = torch.zeros(1, 64, 80, dtype=torch.uint8)
    masks[0, 10:50, 10:50] = 1
    target = dict(boxes=torch.tensor([[10.0, 10, 50, 50]]), labels=torch.tensor([2]), masks=masks)
    losses = model([torch.rand(3, 64, 80)], [target])
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg", "loss_mask"}
    head, objects = model.roi_heads.box_head, model.roi_heads.objects
    assert head.norm.num_batches_tracked == 1 and head.layer4[0].bn1.num_batches_tracked == 1
    assert 1 <= objects.sum() <= 2 and torch.equal(seen[0], head.map[objects])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


# ---- VOC's AP

def split_of(truth):
    """Labelled of [(image, box, label, difficult)], images 0 to the largest."""
    index, boxes, labels, crowd = zip(*truth)
    return d.labelled([None] * (max(index) + 1), ["a", "b"], index, boxes, labels, crowd)


def answers(images, detections):
    """What FineTuning.detect returns, of [(image, box, label, score)]."""
    of = [[row[1:] for row in detections if row[0] == i] for i in range(images)]
    return [(i, np.float32([b for b, _, _ in rows]).reshape(-1, 4), np.int64([label for _, label, _ in rows]),
             np.float32([score for *_, score in rows]), None) for i, rows in enumerate(of)]


def test_voc_ap_by_hand():
    a, b, c, hard = (0, 0, 10, 10), (0, 0, 20, 20), (50, 50, 90, 90), (20, 20, 30, 30)
    truth = split_of([(0, a, 0, False), (0, hard, 0, True), (1, b, 0, False), (1, c, 0, False)])
    found = answers(2, [(0, a, 0, .9), (0, hard, 0, .8), (0, a, 0, .7), (1, b, 0, .6)])
    # by score: hit, neither, second hit of the same object = miss, hit. Recall 1/3 at precision 1, 2/3 at precision 2/3:
    # recall levels 0 to 0.3 have 1, levels 0.4 to 0.6 have 2/3, the rest 0; category b has no object and is left out
    assert e.voc_ap(truth, [0, 1], found) == pytest.approx(dict.fromkeys(("AP", "AP50", "AP75"), 100 * (4 + 3 * 2 / 3) / 11))
    # an IoU of 0.62 hits at 0.5, 0.55 and 0.6 of the ten thresholds; one of exactly 0.5 nowhere; a wrong label nowhere
    one = split_of([(0, (0, 0, 100, 100), 1, False)])
    ap = lambda *found: e.voc_ap(one, [0], answers(1, found))
    assert ap((0, (0, 0, 62, 100), 1, .5)) == pytest.approx(dict(AP=30, AP50=100, AP75=0))
    assert ap((0, (0, 0, 50, 100), 1, .5)) == ap((0, (0, 0, 100, 100), 0, .5)) == ap() == dict(AP=0, AP50=0, AP75=0)


def plain_ap(detections, truth, threshold):
    """The 11-point AP as one loop over detections (image, score, box) with objects (image, box, difficult)."""
    taken, hits, misses, curve = set(), 0, 0, []
    for image, _, p in sorted(detections, key=lambda x: -x[1]):
        best, overlap = None, threshold
        for n, (where, q, _) in enumerate(truth):
            w, h = min(p[2], q[2]) - max(p[0], q[0]), min(p[3], q[3]) - max(p[1], q[1])
            if where == image and w > 0 and h > 0:
                area = lambda r: (r[2] - r[0]) * (r[3] - r[1])
                iou = w * h / (area(p) + area(q) - w * h)
                best, overlap = (n, iou) if iou > overlap else (best, overlap)
        if best is not None and truth[best][2]:
            continue
        fresh = best is not None and best not in taken
        taken, hits, misses = taken | {best}, hits + fresh, misses + (not fresh)
        curve.append((hits, hits / (hits + misses)))
    objects = sum(not t[2] for t in truth)
    return sum(max((p for hit, p in curve if 10 * hit >= k * objects), default=0) for k in range(11)) / 11


def test_voc_ap_against_a_plain_loop():
    random, above = np.random.default_rng(0), 0
    for trial in range(30):
        boxes = random.integers(0, 40, (14, 2)).astype(float)
        truth = [(i % 2, (x, y, x + 20, y + 20), 0, random.random() < 0.25) for i, (x, y) in enumerate(boxes)]
        truth[0] = (*truth[0][:3], False)
        if sum(not t[3] for t in truth) % 10 in (0, 5):
            truth = truth[:-1] + [(*truth[-1][:3], not truth[-1][3])]  # there np.arange's rounding decides a recall level
        found = [(i, tuple(np.float32(np.array(box) + random.normal(0, 2, 4)).tolist()), 0, float(np.float32(random.random())))
                 for i, box, *_ in truth for _ in range(2)]
        result = e.voc_ap(split_of(truth), [0, 1], answers(2, found))
        loop = [100 * plain_ap([(i, s, b) for i, b, _, s in found], [(i, b, hard) for i, b, _, hard in truth], t / 100)
                for t in range(50, 100, 5)]
        assert result == pytest.approx(dict(AP=np.mean(loop), AP50=loop[0], AP75=loop[5]))
        above += 5 < result["AP75"] < result["AP50"]
    assert above > 20  # the cases are not trivial


def test_coco_ap_of_perfect_and_of_wrong_answers(scenes):
    pytest.importorskip("pycocotools")
    split = d.open_labelled("coco", scenes, "val")
    found = []
    for i in range(2):
        rows = range(split.offsets[i], split.offsets[i + 1])
        masks = torch.stack([torch.from_numpy(split.mask(row)) for row in rows])[:, None].float()
        found.append((i, split.boxes[rows], split.labels[rows], np.linspace(.5, .9, len(rows)), e.run_lengths(masks)))
    path, names = scenes / "annotations/instances_val2017.json", [split.images.name(i) for i in range(2)]
    perfect = dict(AP=100.0, AP50=100.0, AP75=100.0)
    assert e.coco_ap(path, names, [0, 1], found, True) == {"box": pytest.approx(perfect), "mask": pytest.approx(perfect)}
    wrong = [(i, boxes, (labels + 1) % 15, scores, masks) for i, boxes, labels, scores, masks in found]
    assert e.coco_ap(path, names, [0, 1], wrong, True)["box"]["AP"] < 60
    assert e.coco_ap(path, names, [0], found[:1], False) == {"box": pytest.approx(perfect)}  # images not tested do not count
    empty = [(0, np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), [])]
    assert e.coco_ap(path, names, [0], empty, True)["mask"]["AP"] == 0


# ---- data and schedule

def test_detection_targets(scenes):
    """Flipped or not, by (epoch, index), a mask fits its box; crowds go in training, VOC's difficult objects do not."""
    split = d.open_labelled("coco", scenes, "train")
    views, flips = e.Detection(split, True, False, True), 0
    for epoch in range(4):
        for j in range(len(views)):
            _, image, target = views[epoch, j]
            plain = torch.from_numpy(split.images.read(j)).permute(2, 0, 1)
            flipped = not torch.equal(image, plain)
            flips += flipped
            assert not flipped or torch.equal(image, plain.flip(2))
            for box, mask in zip(target["boxes"], target["masks"]):
                assert box.tolist() == d.mask_box(mask.bool().numpy())
            assert target["labels"].tolist() == (split.labels[views.rows[j]] + 1).tolist()
    assert 8 < flips < 24
    marked = split._replace(crowd=np.arange(len(split.labels)) % 2 == 0)
    assert sum(map(len, e.Detection(marked, True, False, True).rows)) == (~marked.crowd).sum()
    assert sum(map(len, e.Detection(marked, True, True, True).rows)) == len(split.labels)
    boxless = e.Detection(split._replace(mask=lambda row: None), True, False, True)[0, 0][2]
    assert [d.mask_box(m.bool().numpy()) for m in boxless["masks"]] == boxless["boxes"].tolist()


def config_of(*arguments):
    return e.transfer_config(e.parse_arguments(["--ckpt", "random", *arguments]))


def test_transfer_schedule():
    voc, coco = config_of("--transfer", "voc"), config_of("--transfer", "coco")
    half = config_of("--transfer", "voc", "--batch-size", "8")
    assert (voc.steps, voc.drops, voc.warmup, voc.lr, voc.precise) == (24000, (18000, 22000), 100, 0.02, 200)
    assert (coco.steps, coco.drops, coco.warmup, coco.lr) == (90000, (60000, 80000), 1000, 0.02)
    assert (voc.sides[0], voc.sides[-1], coco.sides[0], coco.sides[-1], coco.long_side) == (480, 800, 640, 800, 1333)
    assert (half.steps, half.drops, half.warmup, half.lr) == (48000, (36000, 44000), 200, 0.01)
    short = config_of("--transfer", "coco", "--steps", "900", "--short-side", "240")
    assert (short.steps, short.drops, short.warmup, short.sides, short.long_side, short.precise) == (900, (600, 800), 10, (240,), 400, 90)
    rate = lambda step: e.FineTuning.learning_rate(SimpleNamespace(config=voc, step=step))
    assert [rate(s) for s in (0, 50, 100, 17999, 18000, 22000)] == pytest.approx([2e-5, .01001, .02, .02, .002, .0002])


def test_precise_norm_is_the_mean_over_batches(scenes, tmp_path):
    run, seen = fine_tuning(scenes, tmp_path), []
    run.model.backbone.bn1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    run.precise_norm()
    norm = run.model.backbone.bn1
    assert len(seen) == run.config.precise == 2 and norm.momentum == 0.1
    mean, variance = (torch.stack([of(x.transpose(0, 1).flatten(1), 1) for x in seen]).mean(0) for of in (torch.mean, torch.var))
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-4, atol=1e-6)


# ---- runs

def test_detector_fits_what_it_saw(tmp_path):
    """Item 5, small: a ResNet-18 from nothing learns two images by heart; before training it finds nothing."""
    root = tmp_path / "scenes"
    d.write_scenes(root, 2)
    run = fine_tuning(root, tmp_path / "out", steps=45, drops=(32, 41), precise=4, lr=0.01, sides=(80,), long_side=134,
                      test_on="train")
    run.train()
    after = run.test()
    assert after["box"]["AP50"] > 60 and after["mask"]["AP50"] > 25


def test_killed_transfer_resumes(scenes, tmp_path, capfd):
    """kill -9 after a checkpoint, the same command again: the weights of an uninterrupted run, bit for bit."""
    more = ["--root", scenes, "--steps", 4, "--save-steps", 2]
    torch.set_num_threads(1)
    assert detection_run(capfd, *more, "--out", tmp_path / "whole")[0] == 0
    process = subprocess.Popen([sys.executable, HERE / "evaluate.py", *LOOK, *map(str, more), "--out", tmp_path / "killed"],
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    last = tmp_path / "killed/last.pt"
    while not last.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "killed/results.json").exists()
    step = torch.load(last, weights_only=True)["step"]
    code, said, _ = detection_run(capfd, *more, "--out", tmp_path / "killed")
    assert code == 0 and f"steps {step} to 4" in said and step in (2, 4)
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "killed"))
    assert one["step"] == two["step"] == 4 and all(torch.equal(one["model"][key], two["model"][key]) for key in one["model"])
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")]
    assert results[0] == results[1] and set(results[0]["mask"]) == {"AP", "AP50", "AP75"}


def test_transfer_on_two_ranks(scenes, tmp_path):
    """torchrun on a CPU: the ranks end with the same weights and statistics, and both halves of the test split count."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", HERE / "evaluate.py", *LOOK,
               "--root", scenes, "--steps", "2", "--out", tmp_path]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["ranks"] == 2 and results["tested"] == 2 and done.stdout.count("box AP50") == 1


def test_transfer_voc(tmp_path, capfd):
    """The whole of --transfer voc on a VOCdevkit: trainval of two years trains, test2007 is tested, boxes alone."""
    scenes = d.Scenes("train")
    for year, lists in ((2007, dict(trainval=[0], test=[1, 3])), (2012, dict(trainval=[2]))):
        base = tmp_path / f"VOCdevkit/VOC{year}"
        for part in ("ImageSets/Main", "JPEGImages", "Annotations"):
            (base / part).mkdir(parents=True)
        for name, numbers in lists.items():
            (base / f"ImageSets/Main/{name}.txt").write_text("".join(f"{i:06d}\n" for i in numbers))
            for i in numbers:
                image, boxes, labels, _ = scenes.render(i)
                cv2.imwrite(str(base / f"JPEGImages/{i:06d}.jpg"), image[..., ::-1])
                things = "".join(
                    f"<object><name>{d.VOC_CATEGORIES[label]}</name><difficult>{n % 2}</difficult><bndbox><xmin>{x1 + 1}</xmin>"
                    f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
                    for n, (label, (x1, y1, x2, y2)) in enumerate(zip(labels, boxes.tolist())))
                (base / f"Annotations/{i:06d}.xml").write_text(
                    f"<annotation><size><width>112</width><height>112</height></size>{things}</annotation>")
    more = ["--transfer", "voc", "--root", tmp_path / "VOCdevkit", "--steps", 1, "--out"]
    code, said, error = detection_run(capfd, *more, tmp_path / "out")
    assert code == 0, error
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["images"], results["tested"]) == (2, 2) and set(results["box"]) == {"AP", "AP50", "AP75"}
    assert "mask" not in results and "box AP75" in said
    (tmp_path / "VOCdevkit/VOC2007/JPEGImages/000001.jpg").unlink()
    code, _, error = detection_run(capfd, *more, tmp_path / "new")
    assert code == 2 and error.count("\n") == 1 and "absent" in error and "000001" in error


def test_not_finite_loss_keeps_the_checkpoint(scenes, tmp_path, capfd):
    code, _, error = detection_run(capfd, "--root", scenes, "--steps", 40, "--save-steps", 1, "--lr", 1e20, "--out", tmp_path)
    assert code == 2 and error.count("\n") == 1 and "not finite at step" in error and str(tmp_path / "last.pt") in error
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["step"] >= 1 and all(value.isfinite().all() for key, value in saved["model"].items() if "running" not in key)


def test_transfer_mistakes(scenes, tmp_path, capfd):
    """Item 6: one line that names the thing, exit code 2."""
    def fails(*words, root=scenes, more=()):
        code, _, error = detection_run(capfd, "--root", root, "--steps", 1, "--out", tmp_path / "out", *more)
        assert code == 2 and error.count("\n") == 1 and all(word in error for word in words), error

    def copy(name, change=lambda found: None, split="val"):
        (tmp_path / name / "annotations").mkdir(parents=True)
        for part in ("train2017", "val2017"):
            (tmp_path / name / part).symlink_to(scenes / part)
        for part in ("train", "val"):
            found = json.loads((scenes / f"annotations/instances_{part}2017.json").read_text())
            change(found) if part == split else None
            (tmp_path / name / f"annotations/instances_{part}2017.json").write_text(json.dumps(found))
        return tmp_path / name
    fails("annotations are missing", root=tmp_path / "nothing")
    fails("no VOC2007", more=("--transfer", "voc"))
    fails("instances_val2017.json", "no sound box", root=copy("empty", lambda found: found.update(annotations=[])))
    fails("absent", "gone.png", root=copy("absent", lambda found: found["images"].append(
        dict(id=99, file_name="gone.png", width=8, height=8))))
    renamed = copy("renamed", lambda found: found["categories"][0].update(name="blob"))
    fails("other classes", "blob", root=renamed)
    fails("--batch-size 16", more=("--batch-size", 16))
    fails("one --ckpt", more=("--ckpt", "random", "random"))
    run = fine_tuning(scenes, tmp_path / "out")
    run.save()
    fails("last.pt is of another run", "steps 4, now 1")
    run.categories = ["blob"]
    run.save()
    fails("other classes", "last.pt", "--out")
    (tmp_path / "out/last.pt").write_bytes(b"PK cut")
    fails("cannot be read as a transfer's checkpoint", "--resume never")
