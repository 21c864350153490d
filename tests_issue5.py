# ------------------------------------------------------------------ VOC, OpenImages, OpenImage-MINI, Table 2 (issue 5)
# The readers on small files in the real layouts, the builder's invariants over random inputs, broken annotations.
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import data as d
from d3ssl import parse_config

HERE = Path(__file__).resolve().parent
CLASSES = [Path(p) / "data/openimages/class-descriptions-boxable.csv" for p in (HERE / "shared", "/work/shared")]
HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"


def box_row(image, label, box=(0.25, 0.5, 0.75, 1.0), group=0):
    """A line of OpenImages' box CSV; `box` is xyxy in shares, the file's order is x, x, y, y."""
    return f"{image:016x},xclick,{label},1,{box[0]},{box[2]},{box[1]},{box[3]},0,1,{group},0,0\n"


def picture(path, width=40, height=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((height, width, 3), 90, np.uint8))


def openimages(root, rows, classes="/m/1,Person\n/m/2,Cattle\n/m/3,Accordion\n", images=(1, 2), split="validation"):
    for image in images:
        picture(root / split / f"{image:016x}.jpg")
    root.mkdir(exist_ok=True)
    (root / "class-descriptions-boxable.csv").write_text(classes)
    (root / f"{split}-annotations-bbox.csv").write_text(HEADER + "".join(rows))
    return root


def coco_file(path, counts):
    """A COCO annotation file with counts[name] boxes of each category."""
    categories = [{"id": 7 + 2 * i, "name": name} for i, name in enumerate(counts)]
    annotations = [{"id": 1, "image_id": 1, "category_id": c["id"], "bbox": [0, 0, 4, 4], "iscrowd": 0}
                   for c in categories for _ in range(counts[c["name"]])]
    path.write_text(json.dumps({"images": [], "annotations": annotations, "categories": categories}))
    return path


XML = """<annotation>
  <size><width>40</width><height>20</height><depth>3</depth></size>
  <object>
    <name>{name}</name>
    <difficult>1</difficult>
    <bndbox><xmax>11</xmax><xmin>1</xmin><ymax>20</ymax><ymin>{ymin}</ymin></bndbox>
    <part><name>head</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></part>
  </object>
  <object><name>dog</name><bndbox><xmin>2.5</xmin><ymin>2</ymin><xmax>99</xmax><ymax>9</ymax></bndbox></object>
</annotation>
"""


def voc(root, year, lists):
    """A VOC year whose lists hold the given names; each image has a difficult cat (with a part) and a dog."""
    base = root / "VOCdevkit" / f"VOC{year}"
    for wanted, names in lists.items():
        (base / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (base / "Annotations").mkdir(exist_ok=True)
        (base / f"ImageSets/Main/{wanted}.txt").write_text("".join(n + "\n" for n in names))
        for name in names:
            picture(base / "JPEGImages" / f"{name}.jpg")
            (base / "Annotations" / f"{name}.xml").write_text(XML.format(name="cat", ymin=6))
    return base


@pytest.fixture
def run_data(monkeypatch, capfd):
    """data.py's command line in this process, which saves two seconds of imports: (exit code, stdout, stderr)."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            d.error_exit(d.main)
        except SystemExit as left:
            code = left.code
        return code, *capfd.readouterr()
    return run


# readers

def test_voc_reads_both_years(tmp_path):
    voc(tmp_path, 2007, {"trainval": ["000005"], "test": ["000001", "000002"]})
    voc(tmp_path, 2012, {"trainval": ["2008_000002"], "train": ["2008_000002"]})
    train, val = (d.open_labelled("voc", tmp_path, split) for split in ("train", "val"))
    assert train.images.names.tolist() == [b"VOC2007/JPEGImages/000005.jpg", b"VOC2012/JPEGImages/2008_000002.jpg"]
    assert [val.images.name(i)[-10:] for i in range(2)] == ["000001.jpg", "000002.jpg"]
    assert val.offsets.tolist() == [0, 2, 4] and val.crowd.tolist() == [True, False] * 2
    assert [val.categories[x] for x in val.labels] == ["cat", "dog"] * 2 and len(val.categories) == 20
    assert val.boxes[:2].tolist() == [[0, 5, 11, 20], [1.5, 1, 40, 9]]  # counted from 0, last pixel included, clipped
    assert d.open_images("voc", tmp_path / "VOCdevkit", "val").names.tolist() == val.images.names.tolist()


def test_voc_without_a_test_list_keeps_train_and_val_apart(tmp_path):
    voc(tmp_path, 2012, {"train": ["a"], "val": ["b"], "trainval": ["a", "b"]})
    names = [d.open_labelled("voc", tmp_path, split).images.name(0)[-5:] for split in ("train", "val")]
    assert names == ["a.jpg", "b.jpg"] and len(d.open_images("voc", tmp_path)) == 1
    with pytest.raises(d.UserError, match="VOC2007/ImageSets/Main/val.txt.*README"):
        d.open_images("voc", tmp_path / "VOCdevkit/VOC2012", "val")


def test_openimages_boxes_are_pixels_of_their_image(tmp_path):
    rows = [box_row(2, "/m/3"), box_row(1, "/m/1", group=1), box_row(2, "/m/1", (-0.1, 0, 0.5, 2))]
    openimages(tmp_path, rows)
    found = d.open_labelled("openimages", tmp_path, "val")
    assert found.images.names.tolist() == [b"%016x.jpg" % i for i in (1, 2)] and found.offsets.tolist() == [0, 1, 3]
    assert found.boxes.tolist() == [[10, 10, 30, 20], [10, 10, 30, 20], [0, 0, 20, 20]]
    assert found.labels.tolist() == [0, 2, 0] and found.crowd.tolist() == [True, False, False]
    assert found.categories == ["Person", "Cattle", "Accordion"]


def test_openimages_size_is_that_of_the_turned_picture(tmp_path):
    from PIL import Image
    openimages(tmp_path, [box_row(1, "/m/1")], images=(1,))
    path = tmp_path / "validation" / f"{1:016x}.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)
    height, width = d.read_image(path).shape[:2]
    assert (width, height) == d.image_size(path) == (20, 40)
    assert d.open_labelled("openimages", tmp_path).boxes.tolist() == [[5, 20, 15, 40]]


def test_openimages_mini_trains_on_its_list_and_is_evaluated_on_validation(tmp_path, capfd):
    rows = [box_row(i, "/m/2") for i in range(1, 6)]
    openimages(tmp_path, rows, images=range(1, 5), split="train")
    openimages(tmp_path, rows[:2])
    (tmp_path / "openimages-mini.txt").write_text("".join(f"train/{i:016x}\n" for i in (4, 2, 5)))
    images = d.open_images("openimages-mini", tmp_path)
    assert images.names.tolist() == [b"%016x.jpg" % i for i in (2, 4)] and images.read(0).shape == (20, 40, 3)
    assert f"line 3: train/{5:016x}" in capfd.readouterr().err
    train, val = (d.open_labelled("openimages-mini", tmp_path, split) for split in ("train", "val"))
    assert train.offsets.tolist() == [0, 1, 2] and train.images.names.tolist() == images.names.tolist()
    assert val.images.root == tmp_path / "validation" and len(val.labels) == 2
    config, _ = parse_config(["--data", "openimages-mini", "--root", str(tmp_path)])
    assert config.arch == "resnet50" and config.root == str(tmp_path)


# the builder

def test_every_shared_name_is_in_the_published_class_list():
    path = next((p for p in CLASSES if p.exists()), None)
    if path is None:
        pytest.skip("the published class list (shared/data/openimages) is not here")
    index, names = d.read_classes(path.parent)
    assert len(names) == len(index) == 601 and all(names)
    assert len(d.COCO_CATEGORIES) == len(set(d.COCO_CATEGORIES)) == 80
    assert set(d.SHARED.values()) <= set(names) and len(set(d.SHARED.values())) == len(d.SHARED) == 79
    assert d.SHARED["mouse"] == "Computer mouse" and set(d.COCO_CATEGORIES) - set(d.SHARED) == {"cup"}
    coco = path.parent.parent / "coco256/annotations/instances_val2017.json"
    assert set(d.coco_counts(coco)) == set(d.COCO_CATEGORIES)


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_keeps_the_caps_and_is_maximal(seed):
    random = np.random.default_rng(seed)
    images, categories, boxes = random.integers(1, 60), random.integers(1, 9), random.integers(1, 400)
    index, label = random.integers(images, size=boxes), random.integers(categories, size=boxes).astype(np.int16)
    cap = random.integers(-1, 12, categories)
    chosen = d.choose_images(index, label, cap, seed)
    table = np.zeros((images, categories), int)
    np.add.at(table, (index, label), 1)
    shared = cap >= 0
    total = table[chosen].sum(0)
    assert (total[shared] <= cap[shared]).all() and len(set(chosen.tolist())) == len(chosen)
    for image in range(images):
        if image in chosen:
            assert table[image, shared].any()
        elif table[image, shared].any():
            assert ((total + table[image])[shared] > cap[shared]).any()


def test_builder_writes_the_list_prints_table_2_and_what_is_missing(tmp_path, run_data):
    random = np.random.default_rng(0)
    rows = [box_row(i, f"/m/{c}") for i in range(1, 41) for c in random.integers(1, 4, 3)]
    openimages(tmp_path / "oi", rows, images=(), split="train")
    coco = coco_file(tmp_path / "coco.json", {"person": 11, "cow": 9, "cup": 5})
    out = tmp_path / "openimages-mini.txt"

    def build(seed):
        code, said, complaint = run_data("openimages-mini", "--annotations", tmp_path / "oi", "--coco", coco, "--out", out,
                                         "--seed", seed)
        assert code == 0 and not complaint
        return out.read_text().splitlines(), said
    chosen, said = build(3)
    assert all(re.fullmatch("train/[0-9a-f]{16}", line) for line in chosen) and chosen == sorted(set(chosen))
    own = [row.split(",") for row in rows if f"train/{row[:16]}" in chosen]
    number = {name: sum(row[2] == label for row in own) for name, label in (("Person", "/m/1"), ("Cattle", "/m/2"))}
    assert 0 < number["Person"] <= 11 and 0 < number["Cattle"] <= 9
    kinds = len({(row[0], row[2]) for row in own})
    here = said[said.index("here"):].split()
    assert here[1:4] == [str(len(chosen)), f"{len(own) / len(chosen):.2f}", f"{kinds / len(chosen):.2f}"]
    assert re.search(r"paper +146,000 +9.10 +3.20 +569", said)
    for name, cap in (("Person", 11), ("Cattle", 9)):
        assert re.search(rf"{name} +{number[name]} of at most +{cap}\n", said)
    assert "not shared: airplane is not in" in said and "without a counterpart: cup" in said
    assert build(3) == (chosen, said) and build(4)[0] != chosen
    (tmp_path / "oi/train-annotations-bbox.csv").write_text(HEADER + "".join(rows[::-1]))
    assert build(3)[0] == chosen  # of the seed and the boxes, not of the order of the rows


def test_a_million_rows_take_little_memory_and_time(tmp_path):
    random, n = np.random.default_rng(0), 1_000_000
    openimages(tmp_path, [], images=(), split="train")
    image, label = np.repeat(random.integers(1, 2**63, n // 8), 8), random.integers(1, 4, n)
    tails = [box_row(0, f"/m/{c}")[16:] for c in range(4)]
    with open(tmp_path / "train-annotations-bbox.csv", "a") as file:
        file.writelines(f"{i:016x}{tails[c]}" for i, c in zip(image.tolist(), label.tolist()))
    coco = coco_file(tmp_path / "coco.json", {"person": 900, "cow": 700})
    code = (f"import resource, sys, time; sys.path.insert(0, {str(HERE)!r}); import data; "
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before, start = peak(), time.monotonic(); "
            f"data.write_mini({str(tmp_path)!r}, {str(coco)!r}, {str(tmp_path / 'list.txt')!r}); "
            "print(peak() - before, peak(), time.monotonic() - start)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    more, peak, seconds = map(float, done.stdout.splitlines()[-1].split())
    assert (peak - more + 14.6 * more) / 2**20 < 2, f"{more / 2**10:.0f} MB a million rows: 14.6 million take over 2 GB"
    assert 14.6 * seconds < 300, f"{seconds:.1f} s a million rows: 14.6 million take over 5 minutes"
    assert 0 < len((tmp_path / "list.txt").read_text().split()) < n


# stats

def test_stats_gives_table_2_and_the_recall_of_the_proposals(tmp_path, run_data):
    rows = [box_row(1, "/m/1"), box_row(1, "/m/2", (0, 0, 0.5, 0.5)), box_row(2, "/m/1"), box_row(2, "/m/3", group=1)]
    openimages(tmp_path, rows, images=(1, 2, 3))
    code, said, _ = run_data("stats", "--data", "openimages", "--root", tmp_path, "--split", "val")
    assert code == 0 and "here 3 1.33 1.33 3" in re.sub(" +", " ", said)
    assert f"python data.py proposals --data openimages --root {tmp_path} --split validation" in said
    folder = tmp_path / "boxes"
    folder.mkdir()
    (folder / "names.txt").write_text(f"{1:016x}.jpg\n{3:016x}.jpg\n")
    np.save(folder / "offsets.npy", np.int64([0, 2, 3]))
    (folder / "settings.json").write_text('{"method": "by hand"}')
    for side, recall in ((9, "33.3%"), (11, "66.7%")):  # IoU 1 with the first; 0.41 or 0.55 with the second; image 2 has none
        np.save(folder / "boxes.npy", np.float32([[10, 10, 30, 20], [0, 0, side, min(side, 10)], [0, 0, 5, 5]]))
        _, said, complaint = run_data("stats", "--data", "openimages", "--root", tmp_path, "--split", "val", "--proposals", folder)
        assert f"1.0 boxes an image, recall at IoU 0.5 {recall} of 3 objects, 1 images without any" in said and not complaint


@pytest.mark.parametrize("data", ["coco", "voc", "scenes"])
def test_stats_reads_every_data_set(tmp_path, data, run_data):
    if data == "coco":
        d.write_scenes(tmp_path, 4)
    if data == "voc":
        voc(tmp_path, 2007, {"train": ["1", "2"]})
    code, said, _ = run_data("stats", "--data", data, "--root", tmp_path)
    name, images, objects, kinds, number = said.splitlines()[1].split()
    expected = d.open_labelled(data, tmp_path, "train")
    per_image = [set(expected.labels[a:b].tolist()) for a, b in zip(expected.offsets, expected.offsets[1:])]
    assert (name, int(images), objects) == ("here", len(per_image), f"{len(expected.boxes) / len(per_image):.2f}")
    assert kinds == f"{sum(map(len, per_image)) / len(per_image):.2f}" and int(number) == len(set.union(*per_image))
    assert code == 0 and "no proposals in" in said


# broken annotations

BROKEN_ROWS = {
    "line cannot be read": "00000000000000zz,xclick,/m/1,1,0,1,0,1,0,0,0,0,0\n",
    "category id unknown": box_row(1, "/m/9"),
    "box empty or outside its image": box_row(1, "/m/1", (1.1, 0, 1.5, 1)),
    "line cannot be read ": box_row(1, "/m/1").replace(",0,1,0,0,0\n", "\n"),
    "line cannot be read  ": box_row(1, "/m/1", ("?", 0, 1, 1)),
    "box empty or outside its image ": box_row(1, "/m/1", ("nan", 0, 1, 1)),
}


@pytest.mark.parametrize("kind", BROKEN_ROWS)
def test_a_broken_row_is_named_and_the_others_are_read(tmp_path, capfd, kind):
    sound = [box_row(1 + i % 2, "/m/1") for i in range(50)]
    openimages(tmp_path, sound[:30] + [BROKEN_ROWS[kind]] + sound[30:])
    assert len(d.open_labelled("openimages", tmp_path).labels) == 50
    said = capfd.readouterr().err
    assert f"left out, {kind.strip()}: 1 in {tmp_path / 'validation-annotations-bbox.csv'} (line 32" in said
    openimages(tmp_path, [BROKEN_ROWS[kind]])
    with pytest.raises(d.UserError, match="validation-annotations-bbox.csv holds no sound box"):
        d.open_labelled("openimages", tmp_path)


def test_broken_bytes_in_openimages_files(tmp_path, capfd):
    openimages(tmp_path, [box_row(1, "/m/1"), box_row(2, "/m/2"), box_row(7, "/m/1")])
    with open(tmp_path / "class-descriptions-boxable.csv", "ab") as file:
        file.write(b"/m/4,Caf\xe9\n/m/5,\n")
    with open(tmp_path / "validation-annotations-bbox.csv", "ab") as file:
        file.write(box_row(1, "/m/1").encode().replace(b"/m/1", b"/m/\xff"))
    found = d.open_labelled("openimages", tmp_path)
    said = capfd.readouterr().err
    assert found.categories[3:] == ["/m/5"] and len(found.labels) == 2  # a class without a name goes by its id
    assert "class-descriptions-boxable.csv (line 4)" in said and "line 5: /m/\ufffd" in said
    assert f"image listed but absent from {tmp_path / 'validation'}: 1" in said and f"{7:016x}" in said


def test_a_csv_cut_in_half_is_an_error_that_names_the_line(tmp_path, run_data):
    openimages(tmp_path, [box_row(1, "/m/1")] * 40, images=(1,), split="train")
    path = tmp_path / "train-annotations-bbox.csv"
    whole = path.read_bytes()
    coco = coco_file(tmp_path / "coco.json", {"person": 9})
    start = whole.index(b"\n", len(whole) // 2) + 1  # a cut anywhere in a row, or with nothing but its newline lost
    row = whole[start:whole.index(b"\n", start)]
    for cut in range(start + 1, start + len(row)):
        path.write_bytes(whole[:cut])
        with pytest.raises(d.UserError, match=f"line {whole[:cut].count(b'%c' % 10) + 1}: the file is cut short"):
            d.write_mini(tmp_path, coco, tmp_path / "list.txt")
    assert not (tmp_path / "list.txt").exists()
    path.write_bytes(whole[:start + len(row)])
    d.write_mini(tmp_path, coco, tmp_path / "list.txt")
    path.write_bytes(whole[:40])
    code, _, said = run_data("openimages-mini", "--annotations", tmp_path, "--coco", coco, "--out", tmp_path / "list.txt")
    assert code == 2 and said.count("\n") == 1 and f"{path}, line 1: not OpenImages' box CSV" in said


def test_missing_files_are_one_line(tmp_path, run_data):
    coco = coco_file(tmp_path / "coco.json", {"unicorn": 9})
    arguments = ["openimages-mini", "--annotations", tmp_path / "oi", "--coco", coco, "--out", tmp_path / "list.txt"]
    code, _, said = run_data(*arguments)
    assert code == 2 and said.count("\n") == 1 and "class-descriptions-boxable.csv" in said
    openimages(tmp_path / "oi", [box_row(1, "/m/1")], split="train")
    assert "share no category" in run_data(*arguments)[2]
    for data in ("voc", "openimages", "openimages-mini", "coco"):
        with pytest.raises(d.UserError, match="README"):
            d.open_images(data, tmp_path / "nowhere")


def test_broken_voc_files_are_named_and_the_others_are_read(tmp_path, capfd):
    base = voc(tmp_path, 2007, {"train": [str(i) for i in range(1, 8)]})
    sound = XML.format(name="cat", ymin=6)
    (base / "JPEGImages/1.jpg").unlink()
    (base / "Annotations/2.xml").unlink()
    (base / "Annotations/3.xml").write_text(sound[:len(sound) // 2])
    (base / "Annotations/4.xml").write_text(sound.replace("cat", "unicorn"))
    (base / "Annotations/5.xml").write_text(XML.format(name="cat", ymin=21))
    (base / "Annotations/6.xml").write_bytes(sound.replace("cat", "c?t").encode().replace(b"?", b"\xe9"))
    with open(base / "ImageSets/Main/train.txt", "ab") as file:
        file.write(b"\xff\xfe\n")
    found = d.open_labelled("voc", tmp_path, "train")
    said = capfd.readouterr().err
    assert len(found.images) == 6 and np.diff(found.offsets).tolist() == [0, 0, 1, 1, 0, 2]
    for words in ("image listed but absent from", "train.txt (line 1: 1)", "train.txt (line 8:", "Annotations/2.xml",
                  "Annotations/3.xml line", "Annotations/4.xml line 3: unicorn", "Annotations/5.xml line 3",
                  "Annotations/6.xml line 4"):
        assert words in said, words
    for path in base.glob("Annotations/*"):
        path.write_text("")
    with pytest.raises(d.UserError, match="holds no sound box"):
        d.open_labelled("voc", tmp_path, "train")


def test_broken_coco_annotations_are_named_and_the_others_are_read(tmp_path, capfd):
    d.write_scenes(tmp_path, 4)
    path = tmp_path / "annotations/instances_train2017.json"
    found = json.loads(path.read_text())
    size = len(found["annotations"])
    for key, value in (("bbox", [500, 5, 9, 9]), ("category_id", 99), ("image_id", 77), ("bbox", [1, 2, 3]), ("bbox", None),
                       ("bbox", [float("nan"), 0, 5, 5])):
        found["annotations"].append({**found["annotations"][0], "id": 1000 + len(found["annotations"]), key: value})
    (tmp_path / "train2017" / found["images"][3]["file_name"]).unlink()
    gone = sum(a["image_id"] == 3 for a in found["annotations"])
    path.write_text(json.dumps(found))
    read = d.open_labelled("coco", tmp_path, "train")
    said = capfd.readouterr().err
    assert len(read.images) == 3 and len(read.labels) == size - gone and np.isfinite(read.boxes).all()
    for words in ("image listed but absent", "category id unknown: 1", "image id unknown: 1", "bbox of four numbers: 2",
                  "box empty or outside its image: 2", "000000000003.png"):
        assert words in said, words
    text = path.read_bytes()
    path.write_bytes(text[:len(text) // 2])
    with pytest.raises(d.UserError, match=r"instances_train2017.json, line 1: not JSON"):
        d.open_labelled("coco", tmp_path, "train")
    path.write_bytes(text.replace(b'"name"', b'\n"na\xffme"', 1))
    with pytest.raises(d.UserError, match=r"instances_train2017.json, line 2: not UTF-8"):
        d.coco_counts(path)
    path.write_text(json.dumps({**found, "categories": [{"id": 1}]}))
    with pytest.raises(d.UserError, match="a category"):
        d.open_labelled("coco", tmp_path, "train")
