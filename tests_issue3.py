"""Tests of evaluate.py and probes.py (issue 3); to be merged into test_d3ssl.py."""
import argparse
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import d3ssl
import evaluate
import probes
from data import Labelled, Scenes, UserError, open_labelled

HERE = Path(__file__).resolve().parent
COCO = next((p / "shared/data/coco256" for p in (HERE, HERE.parent) if (p / "shared/data/coco256").is_dir()), None)
needs_coco = pytest.mark.skipif(COCO is None, reason="shared/data/coco256 is not here")


def run(script, *arguments):
    return subprocess.run([sys.executable, str(HERE / script), *map(str, arguments)], capture_output=True, text=True, cwd=HERE)


# ------------------------------------------------------------------------------------- evaluate.py: any ResNet checkpoint

def resnet_state(arch="resnet50", seed=0):
    """torchvision's state dict with every buffer and parameter different from its default, so that none can be mixed up."""
    torch.manual_seed(seed)
    state = torchvision.models.get_model(arch, weights=None).state_dict()
    return {key: value if value.dtype == torch.long else
            value * (0.9 + 0.2 * torch.rand(value.shape)) + 0.01 * torch.rand(value.shape) for key, value in state.items()}


@pytest.fixture(scope="module")
def plain():
    return resnet_state()


@pytest.fixture(scope="module")
def shifted(plain):
    """The decoy: a momentum encoder that differs from the online one in every weight."""
    return {key: value if value.dtype == torch.long else value * 1.02 for key, value in plain.items()}


def under(prefix, state, fc=True):
    return {prefix + key: value for key, value in state.items() if fc or not key.startswith("fc.")}


def mlp(name, *shapes):
    return {f"{name}.{i}.{part}": torch.ones(shape) for i, shape in shapes for part in ("weight", "bias")}


def moco_to_detectron2(state, prefix):
    """What facebookresearch/moco, detection/convert-pretrain-to-detectron2.py, makes of state["state_dict"]."""
    named = {}
    for key, value in state.items():
        if not key.startswith(prefix):
            continue
        key = key[len(prefix):]
        key = key if "layer" in key else "stem." + key
        for t in (1, 2, 3, 4):
            key = key.replace(f"layer{t}", f"res{t + 1}")
        for t in (1, 2, 3):
            key = key.replace(f"bn{t}", f"conv{t}.norm")
        named[key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = value.numpy()
    return {"model": named, "__author__": "MOCO", "matching_heuristics": True}


QUEUE = {"queue": torch.zeros(128, 64), "queue_ptr": torch.zeros(1, dtype=torch.long)}

LAYOUTS = {
    # torchvision.models.resnet50().state_dict()
    "torchvision": lambda p, s: p,
    # facebookresearch/moco: moco/builder.py (encoder_q, encoder_k, queue; v2's fc is an MLP), main_moco.py (state_dict, DDP)
    "moco": lambda p, s: {"epoch": 200, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}, "state_dict": {
        **under("module.encoder_q.", p, fc=False), **mlp("module.encoder_q.fc", (0, (2048, 2048)), (2, (128, 2048))),
        **under("module.encoder_k.", s, fc=False), **under("module.", QUEUE)}},
    # Tete-Xiao/ReSim: detection/convert-pretrain-to-detectron2.py (MoCo's keys, and an fpn beside the stages)
    "resim": lambda p, s: {"state_dict": {
        **under("module.encoder_k.", s), **under("module.encoder_q.", p),
        "module.encoder_q.fpn.fpn_lateral5.weight": torch.ones(256, 2048, 1, 1)}},
    # hologerry/SoCo: converter_detectron2/convert_detectron2_C4.py (model, model_ema), contrast/option.py (opt, a Namespace)
    "soco": lambda p, s: {"opt": argparse.Namespace(arch="resnet50"), "model_ema": under("encoder.", s), "model": {
        **under("module.encoder.", p, fc=False), **under("module.encoder_k.", s, fc=False),
        "module.projector.linear1.weight": torch.ones(4096, 2048), "module.projector_k.linear1.weight": torch.ones(4096, 2048)}},
    # zdaxie/PixPro: contrast/models/PixPro.py, main_pretrain.py (save_checkpoint)
    "pixpro": lambda p, s: {"opt": argparse.Namespace(model="PixPro"), "scheduler": {"last_epoch": 3}, "model": {
        **under("module.encoder_k.", s, fc=False), **under("module.encoder.", p, fc=False),
        "module.projector.linear1.weight": torch.ones(4096, 2048, 1, 1), "module.value_transform.weight": torch.ones(256, 256, 1, 1)}},
    # WXinlong/DenseCL: openselfsup/models/densecl.py (backbone is encoder_q[0] under a second name)
    "densecl": lambda p, s: {"meta": {"epoch": 800}, "state_dict": {
        **under("encoder_q.0.", p, fc=False), **under("backbone.", p, fc=False), **under("encoder_k.0.", s, fc=False),
        **mlp("encoder_q.1.mlp", (0, (2048, 2048)), (2, (128, 2048))), **QUEUE, "queue2": torch.zeros(128, 64)}},
    # WXinlong/DenseCL and open-mmlab/mmselfsup: tools/extract_backbone_weights.py (bare names)
    "densecl extracted": lambda p, s: {"author": "DenseCL", "state_dict": under("", p, fc=False)},
    # open-mmlab/mmselfsup (OpenSelfSup): openselfsup/models/byol.py (online_net, target_net, backbone is online_net[0])
    "openselfsup byol": lambda p, s: {"state_dict": {
        **under("target_net.0.", s, fc=False), **under("online_net.0.", p, fc=False), **under("backbone.", p, fc=False)}},
    # lucidrains/byol-pytorch: byol_pytorch.py (net, online_encoder.net, target_encoder.net)
    "byol-pytorch": lambda p, s: {
        **under("net.", p), **under("online_encoder.net.", p), **under("target_encoder.net.", s),
        **mlp("online_encoder.projector", (0, (4096, 2048)), (3, (256, 4096)))},
    # facebookresearch/PLRC: PLRC/models/builder.py and resnet.py (encoder_q.enc, encoder_k.enc, fcs, fcs_2)
    "plrc": lambda p, s: {"state_dict": {
        **under("module.encoder_q.enc.", p, fc=False), **under("module.encoder_k.enc.", s, fc=False),
        **mlp("module.encoder_q.enc.fcs", (0, (2048, 2048)), (2, (128, 2048)))}},
    # facebookresearch/dino: main_dino.py (save_dict), utils.py (MultiCropWrapper: backbone, head)
    "dino": lambda p, s: {"student": {**under("module.backbone.", p, fc=False), **mlp("module.head.mlp", (0, (2048, 2048)))},
                          "teacher": {**under("module.backbone.", s, fc=False), **mlp("module.head.mlp", (0, (2048, 2048)))},
                          "epoch": 800, "args": argparse.Namespace(arch="resnet50"), "dino_loss": {"center": torch.zeros(1, 9)}},
    # facebookresearch/moco: detection/convert-pretrain-to-detectron2.py
    "detectron2": lambda p, s: moco_to_detectron2({**under("module.encoder_q.", p), **under("module.encoder_k.", s)},
                                                  "module.encoder_q."),
}
WITH_MOMENTUM = ("moco", "resim", "pixpro", "densecl", "openselfsup byol", "byol-pytorch", "plrc", "dino")


def write_checkpoint(path, content):
    with open(path, "wb") as file:
        pickle.dump(content, file) if "__author__" in content else torch.save(content, file)


def reference_features(state, images):
    network = torchvision.models.resnet50(weights=None)
    network.load_state_dict(state)
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        return network.eval()(images)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_plain_features(layout, plain, shifted, tmp_path):
    write_checkpoint(tmp_path / "x", LAYOUTS[layout](plain, shifted))
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    network, arch = evaluate.load_backbone(tmp_path / "x", trust_pickle=layout == "detectron2")
    assert arch == "resnet50" and not network.training
    expected, decoy = reference_features(plain, images), reference_features(shifted, images)
    assert not torch.allclose(expected, decoy, rtol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected, rtol=0, atol=0)
        if layout in WITH_MOMENTUM:
            teacher, _ = evaluate.load_backbone(tmp_path / "x", teacher=True)
            torch.testing.assert_close(teacher(images), decoy, rtol=0, atol=0)


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet101", "resnet152"])
def test_architecture_is_read_off_the_shapes(arch, tmp_path):
    state = torchvision.models.get_model(arch, weights=None).state_dict()
    torch.save(state, tmp_path / "x.pth")
    network, found = evaluate.load_backbone(tmp_path / "x.pth")
    assert found == arch
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_our_own_checkpoints(tmp_path):
    model = d3ssl.D3SSL(d3ssl.configure({"data": "scenes"}))
    for p in model.teacher.parameters():
        p.data += 0.1
    torch.save({"d3ssl": 1, "config": {"data": "scenes"}, "model": model.state_dict(), "optimizer": {"state": {}}},
               tmp_path / "last.pt")
    torch.save(model.student.backbone.state_dict(), tmp_path / "backbone.pth")
    student, arch = evaluate.load_backbone(tmp_path / "last.pt")
    teacher, _ = evaluate.load_backbone(tmp_path / "last.pt", teacher=True)
    backbone, _ = evaluate.load_backbone(tmp_path / "backbone.pth")
    assert arch == "resnet18"
    for network, expected in ((student, model.student), (teacher, model.teacher), (backbone, model.student)):
        for key, value in expected.backbone.state_dict().items():
            assert torch.equal(network.state_dict()[key], value), key


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


SMALL = {}  # a resnet18's weights, made once


def small():
    SMALL.update(SMALL or resnet_state("resnet18", 1))
    return dict(SMALL)


BROKEN = {
    "missing": (lambda s: without(s, "layer3.1.bn2.running_var"), "lacks layer3.1.bn2.running_var"),
    "missing first": (lambda s: without(s, "layer1.0.conv1.weight"), "lacks layer1.0.conv1.weight"),
    "missing stem": (lambda s: without(s, "conv1.weight"), "lacks conv1.weight"),
    "renamed": (lambda s: {k.replace("layer4.1.bn2.bias", "layer4.1.bn2.beta"): v for k, v in s.items()},
                "lacks layer4.1.bn2.bias"),
    "left over": (lambda s: {**s, "layer2.0.se.weight": torch.ones(3)}, "layer2.0.se.weight has no place"),
    "other shape": (lambda s: {**s, "conv1.weight": torch.ones(64, 3, 3, 3)}, r"conv1.weight is \(64, 3, 3, 3\)"),
    "other depth": (lambda s: {**s, **{k.replace("layer2.1", "layer2.2"): v for k, v in s.items()}}, r"stages of \[2, 3, 2, 2\]"),
    "not finite": (lambda s: {**s, "bn1.weight": torch.full((64,), float("nan"))}, "bn1.weight is not finite"),
    "no ResNet": (lambda s: {"features.0.weight": torch.ones(3)}, "holds no ResNet"),
    "only momentum": (lambda s: under("teacher.", s), "only momentum encoders.*add --teacher"),
    "two": (lambda s: {**under("a.", s), **under("b.", {k: v + 1 for k, v in s.items()})}, "holds 2 ResNets.*--prefix.*a., b."),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_backbone_that_does_not_fit_is_named(case, tmp_path):
    change, message = BROKEN[case]
    torch.save(change(small()), tmp_path / "x.pth")
    with pytest.raises(UserError, match=message) as error:
        evaluate.load_backbone(tmp_path / "x.pth")
    assert "\n" not in str(error.value)


def test_prefix_settles_which(tmp_path):
    state = small()
    torch.save({"model": {**under("a.", state), **under("b.", {k: v + 1 for k, v in state.items()})}}, tmp_path / "x.pth")
    for prefix, plus in (("a", 0), ("model.b.", 1)):
        network, _ = evaluate.load_backbone(tmp_path / "x.pth", prefix=prefix)
        assert torch.equal(network.conv1.weight, state["conv1.weight"] + plus)
    with pytest.raises(UserError, match="--prefix c is none of the ResNets.*model.a., model.b."):
        evaluate.load_backbone(tmp_path / "x.pth", prefix="c")


class Harmful:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_runs_no_code_unasked(write, tmp_path):
    write({"state_dict": small(), "extra": Harmful(tmp_path / "harm")}, tmp_path / "x.pkl")
    with pytest.raises(UserError, match="--trust-pickle"):
        evaluate.load_backbone(tmp_path / "x.pkl")
    assert not (tmp_path / "harm").exists()


def test_files_that_are_no_checkpoints(tmp_path):
    torch.save(small(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:10000])
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("cut.pth", "text.pth", "empty.pth"):
        with pytest.raises(UserError, match=f"{name} is not a checkpoint, or cut short"):
            evaluate.load_backbone(tmp_path / name)
    with pytest.raises(UserError, match="No such file"):
        evaluate.load_backbone(tmp_path / "none.pth")
    with pytest.raises(UserError, match="Is a directory"):
        evaluate.load_backbone(tmp_path)


def test_random_is_seeded_and_leaves_the_global_state():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two, other = (evaluate.load_backbone("random", "resnet18", seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.layer4[1].conv2.weight, two.layer4[1].conv2.weight)
    assert not torch.equal(one.layer4[1].conv2.weight, other.layer4[1].conv2.weight)


def test_export(plain, tmp_path):
    torch.save(under("backbone.", plain), tmp_path / "in.pth")
    network, _ = evaluate.load_backbone(tmp_path / "in.pth")
    evaluate.export(network, "detectron2", tmp_path / "out.pkl")
    with open(tmp_path / "out.pkl", "rb") as file:
        written = pickle.load(file)
    expected = moco_to_detectron2(under("", plain, fc=False), "")["model"]
    expected = {key: value for key, value in expected.items() if "num_batches_tracked" not in key}
    assert written["matching_heuristics"] is True and written["model"].keys() == expected.keys()
    assert all(np.array_equal(written["model"][key], value) for key, value in expected.items())
    evaluate.export(network, "torchvision", tmp_path / "out.pth")
    other = torchvision.models.resnet50(weights=None)
    report = other.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=False)
    assert report.missing_keys == ["fc.weight", "fc.bias"] and not report.unexpected_keys
    assert torch.equal(other.layer4[2].bn3.running_var, plain["layer4.2.bn3.running_var"])


# --------------------------------------------------------------------------------------------------- evaluate.py: O-KNN

def unit(rows):
    return F.normalize(torch.tensor(rows, dtype=torch.float32), dim=1).half()


def test_o_knn_by_hand():
    bank, labels = unit([[1, 0], [1, 0], [0, 1], [0, 1], [-1, 0]]), torch.tensor([4, 2, 1, 3, 0])
    queries = unit([[1, 0], [0, 1], [-1, 0]])
    cosines, index = evaluate.nearest(queries, bank, 3)
    assert index.tolist() == [[0, 1, 2], [2, 3, 0], [4, 2, 3]]  # equal cosines: the lower index first
    assert cosines.tolist() == [[1, 1, 0], [1, 1, 0], [1, 0, 0]]
    first = evaluate.vote(cosines, labels[index], 5)  # equal votes: the lower category first; no vote: no prediction
    assert first.tolist() == [[2, 4, 1, -1, -1], [1, 3, 4, -1, -1], [0, 1, 3, -1, -1]]
    hits = evaluate.o_knn(queries, torch.tensor([2, 3, 2]), bank, labels, 5, k=3)
    assert hits.tolist() == [[True, True], [False, True], [False, False]]
    with pytest.raises(UserError, match="--k 6 is larger than the bank of 5"):
        evaluate.nearest(queries, bank, 6)


def test_votes_are_weighted_by_similarity():
    near, far = np.exp(0.9 / 0.07), np.exp(0.8 / 0.07)
    assert near > 4 * far  # so that one at 0.9 outvotes four at 0.8
    labels = torch.tensor([[3, 1, 1, 1, 1]])
    assert evaluate.vote(torch.tensor([[0.9, 0.8, 0.8, 0.8, 0.8]], dtype=torch.float64), labels, 5)[0, 0] == 3
    assert evaluate.vote(torch.tensor([[0.82, 0.8, 0.8, 0.8, 0.8]], dtype=torch.float64), labels, 5)[0, 0] == 1


def brute_force(queries, bank, labels, categories, k):
    """The same rule as a loop over Python's floats."""
    indices, ranking = [], []
    for q in queries.double().tolist():
        cosine = [np.dot(q, b) for b in bank.double().tolist()]
        order = sorted(range(len(bank)), key=lambda i: (-round(cosine[i], 12), i))[:k]
        votes = np.zeros(categories)
        for i in order:
            votes[labels[i]] += np.exp(cosine[i] / 0.07)
        indices.append(order)
        ranking.append([c if votes[c] else -1 for c in sorted(range(categories), key=lambda c: (-votes[c], c))[:5]])
    return indices, ranking


@pytest.mark.parametrize("dimension", [2, 16, 300])
def test_nearest_and_vote_equal_a_loop(dimension):
    torch.manual_seed(dimension)
    bank = F.normalize(torch.randn(500, dimension), dim=1).half()
    bank[100:160] = bank[0]  # more equal ones than candidates are kept, across the borders of chunks
    bank[300:310] = bank[7]
    queries = torch.cat([bank[[0, 7, 301]], F.normalize(torch.randn(40, dimension), dim=1).half()])
    labels = torch.randint(9, (500,))
    indices, ranking = brute_force(queries, bank, labels, 9, 20)
    for rows, columns in ((4096, 16384), (7, 33), (1, 10)):
        cosines, index = evaluate.nearest(queries, bank, 20, rows=rows, columns=columns)
        assert index.tolist() == indices
        assert evaluate.vote(cosines, labels[index], 9).tolist() == ranking


def test_objects_are_selected_with_distinct_categories_first():
    labels, crowd = np.array([5, 5, 5, 2, 2, 9, 1]), np.array([0, 0, 0, 0, 0, 1, 0], bool)
    assert evaluate.select_objects(labels, crowd, 2).tolist() == [0, 3]
    assert evaluate.select_objects(labels, crowd, 4).tolist() == [0, 1, 3, 6]
    assert evaluate.select_objects(labels, crowd).tolist() == [0, 1, 2, 3, 4, 6]
    assert evaluate.select_objects(labels[5:6], crowd[5:6], 3).tolist() == []


def test_object_features_are_roi_align_7x7_averaged():
    torch.manual_seed(0)
    maps = torch.randn(2, 5, 14, 14)
    boxes = torch.tensor([[[3.0, 5, 200, 300], [0, 0, 448, 448]], [[100, 90, 131, 121], [400, 380, 448, 447.5]]])
    rois = torch.cat([torch.tensor([[0.0], [0], [1], [1]]), boxes.flatten(0, 1)], 1)
    expected = torchvision.ops.roi_align(maps, rois, 7, 1 / 32, sampling_ratio=2, aligned=True).mean((2, 3))
    torch.testing.assert_close(evaluate.object_features(maps, boxes, 1 / 32), F.normalize(expected, dim=1), atol=1e-5, rtol=1e-5)


def test_disturbance_moves_whole_image_features_only():
    objects = evaluate.Objects(open_labelled("scenes", split="val"), 224, None, limit=10)
    (clean, disturbed), labels = evaluate.extract(lambda images: images, objects)  # the mean colour of the box
    assert len(clean) == len(labels) == sum(len(Scenes("val").render(i)[2]) for i in range(10))
    assert torch.equal(clean, disturbed)
    assert labels.tolist() == [label for i in range(10) for label in Scenes("val").render(i)[2]]
    pooled = evaluate.extract(lambda images: images.mean((2, 3), keepdim=True).expand_as(images), objects)[0]
    assert ((pooled[0] - pooled[1]).abs().amax(1) > 0.05).float().mean() > 0.9


def test_disturbed_pictures():
    objects = evaluate.Objects(open_labelled("scenes", split="train"), 112, 2, limit=8)
    seen = set()
    for j in range(len(objects)):
        picture, disturbed, boxes, labels = objects[j]
        assert np.array_equal(picture, Scenes("train").read(j)) and (labels >= 0).sum() <= 2
        inside = np.zeros((112, 112), bool)
        for x1, y1, x2, y2 in boxes[labels >= 0].astype(int):
            inside[y1:y2, x1:x2] = True
        assert np.array_equal(disturbed[inside], picture[inside])
        source = [i for i in range(8) if np.array_equal(disturbed[~inside], Scenes("train").read(i)[~inside])]
        assert len(source) == 1 and source[0] != j
        seen.add(source[0])
        assert np.array_equal(disturbed, objects[j][1])  # no hidden state
    assert len(seen) > 2
    other = evaluate.Objects(objects.labelled, 112, 2, limit=8, seed=1)
    assert any(not np.array_equal(objects[j][1], other[j][1]) for j in range(8))


def test_extract_does_not_depend_on_workers_nor_on_batches(monkeypatch):
    objects = evaluate.Objects(open_labelled("scenes", split="val"), 64, None, limit=9)
    network = evaluate.c5(evaluate.load_backbone("random", "resnet18")[0])
    features, labels = evaluate.extract(network, objects)
    again, same = evaluate.extract(network, objects, workers=2)
    assert torch.equal(features, again) and torch.equal(labels, same) and features.dtype == torch.float16
    monkeypatch.setattr(evaluate, "BATCH", 4)
    torch.testing.assert_close(evaluate.extract(network, objects)[0], features, atol=2e-3, rtol=0)


def write_coco(root, boxes, crowd=(), split="train"):
    """A data set of grey images 64 x 48; boxes: a list of (image, [x, y, w, h], category id)."""
    count = 1 + max([image for image, *_ in boxes] + [2])
    for i in range(count):
        (root / f"{split}2017").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (40 * i, 100, 30)).save(root / f"{split}2017" / f"{i}.png")
    found = {"images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in range(count)],
             "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
             "annotations": [{"id": j, "image_id": image, "bbox": box, "category_id": category, "iscrowd": int(j in crowd)}
                             for j, (image, box, category) in enumerate(boxes)]}
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(found))


def test_crowds_and_empty_boxes_are_left_out(tmp_path):
    write_coco(tmp_path, [(0, [8, 12, 16, 24], 3), (0, [0, 0, 9, 9], 7), (1, [5, 5, 0, 3], 7), (2, [32, 0, 32, 48], 7)],
               crowd=(1,))
    objects = evaluate.Objects(open_labelled("coco", tmp_path, "train"), 128)
    assert objects.count == 2 and len(objects) == 2
    assert objects[0][2].tolist() == [[16, 32, 48, 96]] and objects[0][3].tolist() == [0]  # dog is 3, before cat's 7
    assert objects[1][2].tolist() == [[64, 0, 128, 128]] and objects[1][3].tolist() == [1]


def test_an_unreadable_image_is_left_out(tmp_path, capfd):
    write_coco(tmp_path, [(0, [8, 12, 16, 24], 3), (1, [0, 0, 20, 20], 7), (2, [32, 0, 32, 48], 7)])
    (tmp_path / "train2017" / "1.png").write_bytes(b"no image")
    features, labels = evaluate.extract(lambda images: images, evaluate.Objects(open_labelled("coco", tmp_path, "train"), 64))
    assert labels.tolist() == [0, 1] and features.shape == (2, 2, 3)
    assert "cannot be read: 1.png" in capfd.readouterr().out


@needs_coco
def test_coco256():
    for split, number in (("train", 3), ("val", None)):
        found = json.loads((COCO / "annotations" / f"instances_{split}2017.json").read_text())
        objects = evaluate.Objects(open_labelled("coco", COCO, split), 64, number)
        sound = [a for a in found["annotations"] if not a["iscrowd"]]
        by_image = {im["id"]: [a for a in sound if a["image_id"] == im["id"]] for im in found["images"]}
        by_image = {key: value for key, value in by_image.items() if value}
        assert len(objects) == len(by_image)
        assert objects.count == sum(min(len(value), number or len(value)) for value in by_image.values())
        names = {c["id"]: c["name"] for c in found["categories"]}
        for j in (0, 5, 100):
            image = next(im for im in found["images"] if im["file_name"] == objects.labelled.images.name(objects.filled[j]))
            sx, sy = 64 / image["width"], 64 / image["height"]
            want = [(names[a["category_id"]], [x * sx, y * sy, (x + w) * sx, (y + h) * sy])
                    for a in by_image[image["id"]] for x, y, w, h in [a["bbox"]]]
            _, _, boxes, labels = objects[j]
            have = [(objects.labelled.categories[label], box) for label, box in zip(labels, boxes) if label >= 0]
            assert all(any(n == name and np.allclose(b, box, atol=0.05) for n, b in want) for name, box in have)
            assert len(have) == min(len(want), number or len(want))
            distinct = len({name for name, _ in want})
            assert len({name for name, _ in have}) == min(distinct, number or distinct)


@needs_coco
def test_evaluate_command(tmp_path):
    done = run("evaluate.py", "--ckpt", "random", "random", "--arch", "resnet18", "--data", "coco", "--root", COCO,
               "--limit-images", 12, "--size", 64, "--k", 5, "--objects", 2, "--per-category",
               "--json", tmp_path / "o.json", "--picture", tmp_path / "o.png")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "o.json").read_text())
    assert len(rows) == 2 and rows[0] == rows[1]
    assert list(rows[0]) == ["ckpt", "arch", "oknn_top1", "oknn_top5", "disturbed_top1", "disturbed_top5", "bank", "queries"]
    assert rows[0]["bank"] <= 24 and 0 <= rows[0]["oknn_top1"] <= rows[0]["oknn_top5"] <= 100
    assert f"bank: {rows[0]['bank']} objects of" in done.stdout and f"{rows[0]['oknn_top1']:.1f}" in done.stdout
    assert re.search(r"^person +\d+", done.stdout, re.M)
    assert Image.open(tmp_path / "o.png").size[0] > 1000


ERRORS = {
    "no file": (["--ckpt", "none.pth"], "none.pth: No such file"),
    "annotations": (["--ckpt", "random", "--arch", "resnet18", "--data", "coco", "--root", "{tmp}/nowhere"], "annotations are missing"),
    "no boxes": (["--ckpt", "random", "--arch", "resnet18", "--data", "coco", "--root", "{tmp}/empty"], "no sound box"),
    "k": (["--ckpt", "random", "--arch", "resnet18", "--data", "coco", "--root", "{tmp}/tiny"], "--k 20 is larger than the bank of 3"),
    "size": (["--ckpt", "random", "--size", "100"], "--size 100: a multiple of 32"),
    "format": (["--ckpt", "random", "--export", "onnx", "x"], "detectron2 or torchvision"),
    "option": (["--ckpt", "random", "--what"], "unrecognized arguments: --what"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_mistakes_are_one_line(case, tmp_path, monkeypatch, capsys):
    arguments, message = ERRORS[case]
    write_coco(tmp_path / "empty", [])
    for split in ("train", "val"):
        write_coco(tmp_path / "tiny", [(i, [8, 12, 16, 24], 3) for i in range(3)], split=split)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *(a.format(tmp=tmp_path) for a in arguments)])
    with pytest.raises(SystemExit) as stop:
        evaluate.error_exit(evaluate.main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0], lines


@pytest.fixture(scope="session")
def scenes_run(tmp_path_factory):
    """The folder of the default run on the scenes; its proposals are kept under data/scenes for the next time."""
    out = tmp_path_factory.mktemp("scenes_run")
    done = run("d3ssl.py", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def test_a_trained_checkpoint_beats_the_untrained_network(scenes_run, tmp_path):
    done = run("evaluate.py", "--ckpt", scenes_run / "last.pt", "random", "--arch", "resnet18", "--json", tmp_path / "o.json")
    assert done.returncode == 0, done.stderr
    trained, random = json.loads((tmp_path / "o.json").read_text())
    assert trained["arch"] == random["arch"] == "resnet18" and trained["queries"] > 500
    assert trained["oknn_top1"] >= 1.3 * random["oknn_top1"] > 0


# ----------------------------------------------------------------------------------------------------------- probes.py

def pairs_of_scenes(number=6):
    return probes.Pairs(open_labelled("scenes", split="val"), number)


class Pointwise(torch.nn.Module):
    """Four layers of 1x1 convolutions, strides 4 to 32: no spatial mixing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shapes = ((3, 16, 4), (16, 32, 2), (32, 64, 2), (64, 64, 2))
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(i, o, 1, stride) for i, o, stride in shapes)

    def forward(self, x):
        maps = []
        for layer in self.layers:
            x = F.relu(layer(x))
            maps.append(x)
        return maps


def test_probes_are_one_without_spatial_mixing():
    curves = probes.probe(Pointwise(), pairs_of_scenes())
    assert len(curves.cr) == len(curves.mcs) == 4
    for values in (curves.cr, curves.mcs):
        np.testing.assert_allclose(values, 1, atol=1e-6)
    for errors in (curves.cr_se, curves.mcs_se):
        np.testing.assert_allclose(errors, 0, atol=1e-6)


def leaky(images):
    """One zero-padded box blur of 33 x 33 pixels; of positive values, so that no cosine is near 0, and with a constant beside
    it, so that the darker border of the padding turns the feature."""
    return [F.pad(F.avg_pool2d(images + 2.2, 33, 1, 16), (0, 0, 0, 0, 0, 1), value=1.0)]


def numpy_blur(image):
    """The same by an integral image, (H, W, 4) float64."""
    padded = np.pad(image, ((17, 16), (17, 16), (0, 0))).cumsum(0).cumsum(1)
    blurred = (padded[33:, 33:] - padded[:-33, 33:] - padded[33:, :-33] + padded[:-33, :-33]) / 33 ** 2
    return np.concatenate([blurred, np.ones((*image.shape[:2], 1))], 2)


def test_probes_equal_a_numpy_loop():
    pairs = pairs_of_scenes()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

    def cosine(a, b):
        return a @ b / np.sqrt(a @ a * (b @ b))

    def feature(image, x, y):
        return image[y:y + 96, x:x + 96].reshape(-1, 4).mean(0)
    rates, similarities = [], []
    for i in range(len(pairs)):
        both, alone, grid = (numpy_blur((pixels / 255 - mean) / std + 2.2) for pixels in pairs[i])
        b = feature(both, 160, 64)
        rates.append(cosine(feature(both, 64, 64), b) / cosine(feature(alone, 64, 64), b))
        centre = feature(grid, 96, 96)
        similarities.append(np.mean([cosine(centre, feature(grid, x, y)) for x in (0, 96, 192) for y in (0, 96, 192)
                                     if (x, y) != (96, 96)]))
    curves = probes.probe(leaky, pairs)
    assert abs(np.mean(rates) - 1) > 1e-4 and np.mean(similarities) < 1 - 5e-5  # it does leak, and zero padding tells the place
    np.testing.assert_allclose(curves.cr, [np.mean(rates)], atol=1e-5)
    np.testing.assert_allclose(curves.mcs, [np.mean(similarities)], atol=1e-5)
    np.testing.assert_allclose(curves.cr_se, [np.std(rates, ddof=1) / 6 ** 0.5], atol=1e-5)
    np.testing.assert_allclose(curves.mcs_se, [np.std(similarities, ddof=1) / 6 ** 0.5], atol=1e-5)


def test_pairs_are_what_they_say():
    pairs = pairs_of_scenes(40)
    for i in range(40):
        both, alone, grid = pairs[i]
        a = alone[64:160, 64:160]
        assert a.any() and np.array_equal(both[64:160, 64:160], a) and both[64:160, 160:256].any()
        assert alone.sum() == a.sum() and both.sum() == a.sum() + both[64:160, 160:256].sum()  # black around
        assert all(np.array_equal(grid[y:y + 96, x:x + 96], a) for x in (0, 96, 192) for y in (0, 96, 192))
        assert np.array_equal(both, pairs[i][0])
    labelled = pairs.labelled
    drawn = []
    pairs.square = drawn.append  # the rows that a pair is made of
    for i in range(40):
        pairs.draw(i)
    labels = labelled.labels[drawn].reshape(-1, 2)
    assert (labels[:, 0] != labels[:, 1]).all() and len(set(drawn)) > 60


def test_cut_out_keeps_mask_and_proportions():
    image = np.full((50, 80, 3), 200, np.uint8)
    square = probes.cut_out(image, np.float32([10, 5, 58, 29]))  # 48 x 24 -> 96 x 48, centred
    assert square.shape == (96, 96, 3) and (square[24:72] == 200).all() and not square[:24].any() and not square[72:].any()
    mask = np.zeros((50, 80), bool)
    mask[:, :34] = True
    square = probes.cut_out(image, np.float32([10, 5, 58, 29]), mask)
    assert (square[24:72, :46] == 200).all() and not square[:, 50:].any()


def test_probes_need_two_categories_of_some_size():
    labelled = open_labelled("scenes", split="val")
    for change in (dict(labels=np.zeros_like(labelled.labels)), dict(boxes=labelled.boxes / 10), dict(crowd=~labelled.crowd)):
        with pytest.raises(UserError, match="no two objects of different categories"):
            probes.Pairs(Labelled(**{**labelled._asdict(), **change}))


def test_probes_command(tmp_path):
    torch.save(small(), tmp_path / "x.pth")
    done = run("probes.py", "--ckpt", tmp_path / "x.pth", "random", "--arch", "resnet18", "--pairs", 4, "--plot", tmp_path / "c.png",
               "--picture", tmp_path / "p.png", "--json", tmp_path / "p.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "p.json").read_text())
    assert [row["ckpt"] for row in rows] == [str(tmp_path / "x.pth"), "random"]
    for row in rows:
        assert list(row) == ["ckpt", "arch", "cr", "cr_se", "mcs", "mcs_se"] and all(len(row[key]) == 4 for key in list(row)[2:])
        assert f"{row['cr'][3]:.4f}" in done.stdout and f"{row['mcs_se'][0]:.4f}" in done.stdout
    assert Image.open(tmp_path / "c.png").size == (1500, 600) and Image.open(tmp_path / "p.png").size[0] > 900


def test_stages_are_the_four_maps():
    network, _ = evaluate.load_backbone("random", "resnet18")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = probes.stages(network)(x)
        assert [m.shape[1] for m in maps] == [64, 128, 256, 512] and [m.shape[2] for m in maps] == [16, 8, 4, 2]
        torch.testing.assert_close(maps[3].mean((2, 3)), network(x))
        torch.testing.assert_close(evaluate.c5(network)(x), maps[3])
