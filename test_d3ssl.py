"""Tests of D3SSL, each against an independent check. `python -m pytest -q` runs all; those that need ../shared are skipped
where it is not. Runs of the command line are subprocesses: what a user types is what is tested."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import augment
import d3ssl
import data

HERE = Path(__file__).resolve().parent
COCO = HERE.parent / "shared" / "data" / "coco256"
needs_coco = pytest.mark.skipif(not COCO.exists(), reason="../shared/data/coco256 is not here")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_boxes(batch, k, size, low=20, seed=0):
    """(batch, k, 4) float boxes with sides of at least `low` inside a view of size (H, W)."""
    g, (height, width) = seeded(seed), size
    sides = low + torch.rand(batch, k, 2, generator=g) * (torch.tensor([width, height]) * 0.8 - low)
    corner = torch.rand(batch, k, 2, generator=g) * (torch.tensor([width, height]) - sides)
    return torch.cat([corner, corner + sides], -1)


def command(*words, timeout=400, env=None, ok=True):
    """Run one of the project's scripts as a user does; returns the finished process, its output in one string."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=timeout, env={**os.environ, **(env or {})})
    assert not ok or done.returncode == 0, done.stdout
    return done


def bounding(mask):
    """x1, y1, x2, y2 of the pixels set in a (H, W) mask, by looking at each."""
    spots = [(x, y) for y, row in enumerate(mask.tolist()) for x, value in enumerate(row) if value]
    xs, ys = zip(*spots)
    return min(xs), min(ys), max(xs) + 1, max(ys) + 1


# ------------------------------------------------------------------------------------------------ region augmentations

def test_prc_cuts_a_rectangle_of_the_boxs_aspect_and_of_the_right_area():
    n, box = 400, [10, 20, 90, 60]
    mask = augment.proposal_random_cutout(torch.ones(n, 1, 100, 100), torch.tensor([[box]] * n).float(), generator=seeded())
    shares, corners = [], []
    for hidden in 1 - mask[:, 0]:
        x1, y1, x2, y2 = bounding(hidden)
        assert hidden.sum() == (x2 - x1) * (y2 - y1)  # one full rectangle
        assert box[0] <= x1 and box[1] <= y1 and x2 <= box[2] and y2 <= box[3]
        assert abs((x2 - x1) - 2 * (y2 - y1)) <= 1.5  # the box is 80 x 40, sides are rounded to pixels
        shares.append(float(hidden.sum()) / 3200)
        corners.append((x1 - 10) / (80 - (x2 - x1)))
    assert 0.18 < min(shares) < 0.22 and 0.48 < max(shares) < 0.53 and abs(np.mean(shares) - 0.35) < 0.02
    assert min(corners) == 0 and max(corners) == 1 and abs(np.mean(corners) - 0.5) < 0.05  # uniformly placed


def test_prc_recovers_a_box_that_is_hidden_beyond_the_threshold_and_counts_what_is_hidden_below_it():
    boxes = torch.tensor([[[0, 0, 10, 10.0]]])
    mask = torch.zeros(1, 1, 20, 20)
    mask[..., 10:, 10:] = 1
    after = augment.proposal_random_cutout(mask, boxes, share=(0.3, 0.3), generator=seeded())
    assert after[0, 0, :10, :10].sum() == 100 - round(10 * math.sqrt(0.3)) ** 2  # recovered, then cut by its own share
    assert torch.equal(after[..., 10:, :], mask[..., 10:, :])                     # nothing outside the box has changed
    mask = torch.ones(1, 1, 20, 20)
    mask[..., :4, :10] = 0  # 40 % hidden: below the threshold
    assert torch.equal(augment.proposal_random_cutout(mask, boxes, share=(0.3, 0.3), generator=seeded()), mask)  # s <= c
    after = augment.proposal_random_cutout(mask, boxes, share=(0.5, 0.5), generator=seeded())
    cut = (mask - after).sum()
    assert 0 <= cut <= round(10 * math.sqrt(0.1)) ** 2  # area (s - c)|R|, less where it falls on the hidden part
    mask[..., :6, :10] = 0  # 60 %: beyond it
    after = augment.proposal_random_cutout(mask, boxes, share=(0.2, 0.2), generator=seeded())
    assert (1 - after[0, 0, :10, :10]).sum() == round(10 * math.sqrt(0.2)) ** 2


def test_prc_goes_from_the_largest_to_the_smallest_box():
    """A small box inside the large one's cut is recovered and keeps at least half of itself visible, however listed."""
    large, small = [0, 0, 100, 100.0], [45, 45, 55, 55.0]
    n, overlaps = 200, 0
    for order in ([large, small], [small, large]):
        mask = augment.proposal_random_cutout(torch.ones(n, 1, 100, 100), torch.tensor([order] * n), share=(0.5, 0.5), generator=seeded(1))
        hidden = 1 - mask[:, 0, 45:55, 45:55].mean((1, 2))
        assert hidden.max() <= 0.5 + 0.02 and hidden.min() > 0.3  # cut last: a full share of its own
        ring = 1 - mask[:, 0, 44, 40:60].mean(1)
        overlaps += int(((ring > 0.9) & (hidden < 0.6)).sum())  # the large cut lay over it and was taken back
    assert overlaps > 50


def outside_part(mask, box):
    x1, y1, x2, y2 = box
    outside = mask.clone()
    outside[y1:y2, x1:x2] = 0
    return outside


def test_prm_rectangles_have_the_right_area_aspect_and_come_from_all_directions():
    n, box = 600, [60, 70, 110, 130]
    boxes = torch.tensor([[box]] * n).float()
    reveal = augment.proposal_random_mask(boxes, (200, 180), generator=seeded())
    hide = augment.proposal_random_mask(boxes, (200, 180), reading="hide", generator=seeded())
    assert reveal[:, 0, 70:130, 60:110].all() and hide[:, 0, 70:130, 60:110].all()
    sides, shares = [], []
    for seen, kept in zip(reveal[:, 0], hide[:, 0]):
        extra = outside_part(seen, box)
        assert torch.equal(outside_part(1 - kept, box), extra)  # what one reading reveals the other hides
        x1, y1, x2, y2 = bounding(extra)
        side = ("left" if x2 <= 60 else "") + ("right" if x1 >= 110 else "") + ("up" if y2 <= 70 else "") + ("down" if y1 >= 130 else "")
        sides.append((x1 < 60, x2 > 110, y1 < 70, y2 > 130))
        if side and extra.sum() == (x2 - x1) * (y2 - y1):  # off the corners: half of the rectangle is outside, half inside
            w, h = ((x2 - x1) * 2, y2 - y1) if side in ("left", "right") else (x2 - x1, (y2 - y1) * 2)
            shares.append(w * h / 3000)
            assert 0.68 < w / h < 1.47
    reached = np.mean(sides, axis=0)  # how often each side of the box shows background: the same from all directions
    assert reached.min() > 0.3 and reached.max() < 0.55 and abs(reached[0] - reached[1]) < 0.08 and abs(reached[2] - reached[3]) < 0.08
    assert len(shares) > 60 and min(shares) > 0.17 and 0.45 < max(shares) < 0.65


def test_box_jitters_stay_in_bounds():
    boxes, size = random_boxes(200, 5, (90, 130)), (90, 130)
    limit = torch.tensor([130, 90, 130, 90.0])
    restricted = augment.restricted_box_jitter(boxes, size, generator=seeded())
    free = augment.box_jitter(boxes, size, generator=seeded())
    side = lambda b: b[..., 2:] - b[..., :2]
    for jittered in (restricted, free):
        assert (jittered >= 0).all() and (jittered <= limit).all() and (side(jittered) > 0).all()
    assert (side(restricted) <= side(boxes) + 1e-4).all() and (side(restricted) < side(boxes)).float().mean() > 0.95
    moved = ((restricted[..., :2] + restricted[..., 2:]) - (boxes[..., :2] + boxes[..., 2:])) / 2 / side(boxes)
    assert moved.abs().max() <= 0.2 and moved.abs().max() > 0.09  # 0.1 of the side, and what clipping adds
    assert (side(free) > side(boxes)).any() and (free == boxes).all(-1).float().mean() == pytest.approx(0.5, abs=0.05)


def test_soco_cutout_hides_a_square_of_the_right_area():
    boxes = torch.tensor([[[20, 20, 120, 100.0]]] * 300)
    mask = augment.random_cutout(torch.ones(300, 1, 140, 140), boxes, generator=seeded())
    hidden = 1 - mask[:, 0]
    assert (outside_part(hidden.amax(0), [20, 20, 120, 100]) == 0).all()
    touched = hidden.flatten(1).any(1)
    assert touched.float().mean() == pytest.approx(0.5, abs=0.1)
    assert (hidden[touched].sum((1, 2)) / 8000).max() <= 0.31


def test_shift_keeps_every_box_inside_and_is_uniform():
    boxes, size = random_boxes(300, 3, (100, 140), low=10), (100, 140)
    shifted, offset = augment.shift_boxes(boxes, size, generator=seeded())
    assert offset.dtype == torch.int64 and offset.shape == (300, 2)
    torch.testing.assert_close(shifted - boxes, offset.repeat(1, 2)[:, None].float().expand_as(boxes), rtol=0, atol=1e-4)
    assert (shifted >= -1e-4).all() and (shifted <= torch.tensor([140, 100, 140, 100.0]) + 1e-4).all()
    spanning = torch.tensor([[[0, 10, 140, 30.0], [5, 60, 20, 100.0]]] * 50)
    shifted, offset = augment.shift_boxes(spanning, size, generator=seeded())
    assert (offset[:, 0] == 0).all() and (offset[:, 1] >= -10).all() and (offset[:, 1] <= 0).all()
    one = torch.tensor([[[3, 0, 8, 100.0]]] * 4000)
    seen = np.bincount(augment.shift_boxes(one, size, generator=seeded())[1][:, 0].numpy() + 3)
    assert len(seen) == 136 and seen.min() > 8  # every offset from -3 to 132 occurs


def test_composite_copies_pixels_exactly():
    size = (40, 52)
    images, backgrounds = torch.randn(6, 3, *size, generator=seeded(0)), torch.randn(6, 3, *size, generator=seeded(1))
    boxes = random_boxes(6, 2, size, low=8).round()
    shifted, offset = augment.shift_boxes(boxes, size, generator=seeded(2))
    m, m_hat = torch.zeros(6, 1, *size), torch.zeros(6, 1, *size)
    for i in range(6):
        for (x1, y1, x2, y2), (u1, v1, u2, v2) in zip(boxes[i].int().tolist(), shifted[i].int().tolist()):
            m[i, :, y1:y2, x1:x2], m_hat[i, :, v1:v2, u1:u2] = 1, 1
        m_hat[i, :, 10:20, 10:20] = 0
    x3 = augment.composite(images, m, backgrounds, m_hat, offset)
    for i in range(6):
        dx, dy = offset[i].tolist()
        for y in range(size[0]):
            for x in range(size[1]):
                wanted = images[i, :, y - dy, x - dx] if m_hat[i, 0, y, x] else backgrounds[i, :, y, x]
                assert torch.equal(x3[i, :, y, x], wanted)


def test_colour_transform_is_the_sequence_of_torchvisions_operations():
    """Within the gamut the one affine transform equals torchvision's adjust_* one after the other; hue keeps luma."""
    from torchvision.transforms.v2 import functional as tv
    images = 0.4 + 0.15 * torch.rand(8, 3, 16, 16, generator=seeded())
    no_hue = augment.Colour(hue=0.0, p_jitter=1.0, p_grey=0.0)
    matrix, offset = augment.colour_transform(images.mean((2, 3)), no_hue, seeded(3))
    mine = torch.einsum("bij,bjhw->bihw", matrix, images) + offset[..., None, None]
    factors = 1 + 0.4 * (2 * torch.rand((6, 8), generator=seeded(3))[:3] - 1)
    for i in range(8):
        theirs = images[i]
        for adjust, factor in zip((tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation), factors[:, i].tolist()):
            theirs = adjust(theirs, factor)
        torch.testing.assert_close(mine[i], theirs, rtol=0, atol=2e-3)  # torchvision's luma weights are rounded to 4 digits
    matrix, offset = augment.colour_transform(images.mean((2, 3)), augment.Colour(0.0, 0.0, 0.0, 0.1, 1.0, 0.0), seeded(4))
    turned = torch.einsum("bij,bjhw->bihw", matrix, images) + offset[..., None, None]
    luma = torch.tensor([0.299, 0.587, 0.114])
    torch.testing.assert_close(torch.einsum("bchw,c->bhw", turned, luma), torch.einsum("bchw,c->bhw", images, luma), rtol=0, atol=1e-3)
    assert (turned - images).abs().max() > 0.01


def test_blur_is_a_gaussian():
    image = torch.rand(4, 3, 64, 64, generator=seeded())
    blurred = augment.blur(image, augment.Colour(p_blur=1.0, sigma=(1.4, 1.4)), seeded())
    wanted = torchvision.transforms.functional.gaussian_blur(image, 15, 1.4 * 64 / 224)
    torch.testing.assert_close(blurred[..., 8:-8, 8:-8], wanted[..., 8:-8, 8:-8], rtol=0, atol=1e-4)
    torch.testing.assert_close(augment.blur(image, augment.Colour(p_blur=0.0), seeded()), image, rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------- encoder, losses, queue

@pytest.mark.parametrize("bins, scale", [(14, 1 / 16), (7, 1 / 32), (1, 1 / 32)])
def test_roi_align_is_torchvisions(bins, scale):
    size = (160, 224)
    maps = torch.randn(3, 5, int(160 * scale), int(224 * scale), generator=seeded(), dtype=torch.float64)
    boxes = random_boxes(3, 4, size).double()
    boxes[0, 0], boxes[1, 1] = torch.tensor([-30.0, -30, 60, 80]), torch.tensor([150.0, 100, 224, 160])
    mine, theirs = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    a = d3ssl.roi_align(mine, boxes, bins, scale)
    b = torchvision.ops.roi_align(theirs, list(boxes), bins, scale, sampling_ratio=2, aligned=True)
    weight = torch.randn(a.shape, generator=seeded(1), dtype=torch.float64)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-5)


def test_info_nce_is_equation_5():
    z, z_pos, negatives = (F.normalize(torch.randn(n, 16, generator=seeded(n)), dim=1) for n in (7, 8, 50))
    z_pos, losses = z_pos[:7], []
    for a, b in zip(z.double().numpy(), z_pos.double().numpy()):
        terms = [math.exp(a @ b / 0.2)] + [math.exp(a @ n / 0.2) for n in negatives.double().numpy()]
        losses.append(-math.log(terms[0] / sum(terms)))
    assert float(d3ssl.info_nce(z, z_pos, negatives, 0.2)) == pytest.approx(np.mean(losses), abs=1e-5)


def test_queue_is_first_in_first_out_across_a_wrap():
    queue, history = d3ssl.Queue(10, 4), []
    start = queue.features.clone()
    torch.testing.assert_close(start.norm(dim=1), torch.ones(10))
    history = list(start)
    for n in (4, 4, 4, 7, 13):
        z = torch.randn(n, 4, generator=seeded(n))
        queue.enqueue(z)
        history += list(z)
        kept = {tuple(row.tolist()) for row in queue.features}
        assert kept == {tuple(row.tolist()) for row in history[-10:]}  # the last ten, whatever their place


def tiny(**settings):
    """A config of a small model on scenes."""
    return d3ssl.configure({"data": "scenes", "size": 64, "boxes": 2, "batch_size": 4, "seed": 3, **settings})


def tiny_views(config, batch=4, seed=5):
    g = seeded(seed)
    views = [torch.randint(0, 256, (batch, config.size, config.size, 3), dtype=torch.uint8, generator=g) for _ in range(2)]
    boxes = [random_boxes(batch, config.boxes, (config.size, config.size), seed=s) for s in (1, 2)]
    return augment.make_views([*views, *boxes], config.augs, config.prm, config.depositioning, seeded(seed))


def test_teacher_gets_no_gradient_and_moves_by_the_ema():
    config = tiny()
    model = d3ssl.D3SSL(config)
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=seeded()))
    before = [p.clone() for p in model.teacher.parameters()]
    buffers = model.teacher.backbone.bn1.running_mean.clone()
    model(tiny_views(config)).loss.backward()
    assert all(p.grad is None for p in model.teacher.parameters()) and all(p.grad is not None for p in model.student.parameters())
    assert all(torch.equal(p, b) for p, b in zip(model.teacher.parameters(), before))
    assert not torch.equal(model.teacher.backbone.bn1.running_mean, buffers)  # in training mode, with its own buffers
    model.update_teacher(0.9)
    for k, q, b in zip(model.teacher.parameters(), model.student.parameters(), before):
        torch.testing.assert_close(k, (0.9 * b.double() + 0.1 * q.double()).float(), rtol=1e-5, atol=1e-7)


def test_networks_see_what_the_equations_say():
    config = tiny(batch_size=6)
    model, seen = d3ssl.D3SSL(config), {"student": [], "teacher": []}
    for name, calls in seen.items():
        getattr(model, name).backbone.conv1.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[0]))
    views = tiny_views(config, batch=6)
    model(views)
    x1, x2s, x3 = seen["student"]
    t1, t2 = seen["teacher"]
    assert x2s.shape == (6, 3, 32, 32) and x1.shape == x3.shape == (6, 3, 64, 64)
    small = F.interpolate(views.x2, scale_factor=0.5, mode="bilinear", antialias=False)
    for seen_view, whole in ((x2s, small), (x1, views.x1)):  # Eq. 2: a mask times the view, the same in all channels
        hidden = (seen_view == 0).all(1, keepdim=True)
        torch.testing.assert_close(seen_view, whole * ~hidden, rtol=0, atol=1e-5)
        assert 0.05 < hidden.float().mean() < 0.95
    assert torch.equal(t1, x1) and torch.equal(t2, views.x2)  # Eq. 3: the teacher sees x1^ and the whole x2, to the bit
    background = views.x2[[1, 2, 3, 4, 5, 0]]
    outside = views.m_hat.expand_as(x3) == 0
    assert torch.equal(x3[outside], background[outside]) and (x3[~outside] != background[~outside]).float().mean() > 0.9


def test_loss_is_the_sum_of_the_equations():
    """Eqs. 4, 9 and 10 put together by hand from the networks' own features."""
    config = tiny(queue=16)
    model = d3ssl.D3SSL(config).eval()
    v = tiny_views(config)
    with torch.no_grad():
        losses = model(v)
        zs1, zs2, zs3 = model.student(v.x1_hat, v.rois1), model.student(v.x2s_hat, v.rois2 / 2), model.student(v.x3, v.rois3)
        zt1, zt2 = model.teacher(v.x1_hat, v.rois1), model.teacher(v.x2, v.rois2)

    def nce(z, positive):
        total = 0.0
        for a, b in zip(z.double(), positive.double()):
            logits = torch.cat([(a @ b)[None], model.queue.features.double() @ a]) / 0.2
            total += float(-logits.log_softmax(0)[0]) / len(z)
        return total
    assert float(losses.loss_dc) == pytest.approx(nce(zs1, zt2) + nce(zs2, zt1), abs=1e-4)
    assert float(losses.loss_dp) == pytest.approx(nce(zs3, zt2) + nce(zs3, zt1), abs=1e-4)
    assert float(losses.loss) == pytest.approx(float(losses.loss_dc) + float(losses.loss_dp), abs=1e-5)
    assert torch.equal(losses.keys, torch.cat([zt1, zt2]))


RANKS_SCRIPT = """
import sys, torch, torch.distributed as dist
import d3ssl, test_d3ssl as t, augment
dist.init_process_group("gloo")
rank = dist.get_rank()
queue = d3ssl.Queue(6, 2)
for step in range(3):
    queue.enqueue(torch.full((2, 2), float(10 * step + rank)))
config = t.tiny(queue=16)
model = d3ssl.D3SSL(config).eval()
model.load_state_dict(torch.load(sys.argv[1] + "/model.pt"))
views = torch.load(sys.argv[1] + "/views.pt")
half = augment.Views(*[v[rank * 2:rank * 2 + 2] for v in views])
parallel = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
losses = parallel(half)
losses.loss.backward()
loss = losses.loss.detach() / 2
dist.all_reduce(loss)
torch.save((queue.features, loss, {n: p.grad for n, p in model.student.named_parameters()}, d3ssl.gather(losses.keys)),
           f"{sys.argv[1]}/rank{rank}.pt")
"""


def test_two_ranks_are_one_rank_with_the_whole_batch(tmp_path):
    config = tiny(queue=16)
    torch.manual_seed(0)
    model, views = d3ssl.D3SSL(config).eval(), tiny_views(config)  # eval: batch norm frozen
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(tuple(views), tmp_path / "views.pt")
    losses = model(views)
    losses.loss.backward()
    (tmp_path / "script.py").write_text(RANKS_SCRIPT)
    command("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29611, tmp_path / "script.py", tmp_path,
            env={"PYTHONPATH": str(HERE)})
    (queue, loss, grads, keys), other = (torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1))
    assert torch.equal(queue, other[0]) and sorted(queue[:, 0].tolist()) == [11, 11, 20, 20, 21, 21]
    assert torch.equal(keys, other[3])
    torch.testing.assert_close(loss, losses.loss.detach(), rtol=1e-5, atol=1e-5)
    for name, p in model.student.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-5)


def test_lars_scales_each_layers_step():
    weight, bias = nn.Parameter(torch.randn(5, 3, generator=seeded())), nn.Parameter(torch.ones(5))
    w0, gw, gb = weight.detach().double(), torch.randn(5, 3, generator=seeded(1)), torch.randn(5, generator=seeded(2))
    optimizer = d3ssl.LARS([weight, bias], lr=0.5, momentum=0.9, weight_decay=0.1)
    weight.grad, bias.grad = gw.clone(), gb.clone()
    optimizer.step()
    step = gw.double() + 0.1 * w0
    torch.testing.assert_close(weight.detach().double(), w0 - 0.5 * 0.001 * w0.norm() / step.norm() * step, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias.detach(), 1 - 0.5 * gb)


# ------------------------------------------------------------------------------------------- images, scenes, proposals

def test_images_are_read_as_a_viewer_shows_them(tmp_path):
    """Grey, CMYK, 16-bit, palette, alpha and EXIF-rotated files against PIL."""
    y, x = np.mgrid[0:40, 0:60]
    rgb = np.stack([x * 4, y * 6, (x + y) * 2], -1).astype(np.uint8)
    picture = Image.fromarray(rgb)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: a viewer shows it rotated by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=98)
    picture.convert("L").save(tmp_path / "grey.jpg", quality=98)
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    picture.convert("P").save(tmp_path / "palette.gif")
    cv2.imwrite(str(tmp_path / "deep.png"), rgb[..., ::-1].astype(np.uint16) * 257)
    picture.save(tmp_path / "plain-ü.png")
    wanted = {"turned.jpg": np.rot90(rgb, -1), "grey.jpg": np.stack([np.asarray(picture.convert("L"))] * 3, -1), "cmyk.jpg": rgb,
              "palette.gif": rgb, "deep.png": rgb, "plain-ü.png": rgb}
    tolerance = {"palette.gif": 40}
    for name, pixels in wanted.items():
        got = data.read_image(tmp_path / name)
        assert got.shape == pixels.shape and got.dtype == np.uint8, name
        assert np.abs(got.astype(int) - pixels).mean() < tolerance.get(name, 3), name
    (tmp_path / "empty.jpg").write_bytes(b"")
    with pytest.raises(OSError):
        data.read_image(tmp_path / "empty.jpg")


def test_scenes_are_deterministic_and_their_boxes_fit_their_masks():
    for split in ("train", "val"):
        a, b = data.Scenes(split), data.Scenes(split)
        for i in (0, 7):
            (p, boxes, labels, masks), (q, *_) = a.render(i), b.render(i)
            assert np.array_equal(p, q) and np.array_equal(p, a.read(i)) and not np.array_equal(p, data.Scenes(split, seed=1).read(i))
            assert 2 <= len(boxes) <= 5 and len(boxes) == len(labels) == len(masks) and not (masks.sum(0) > 1).any()
            assert [bounding(m) for m in masks] == [tuple(box) for box in boxes.tolist()]
    assert not np.array_equal(data.Scenes("train").read(0), data.Scenes("val").read(0))
    assert len(data.SCENE_CATEGORIES) >= 12


def test_written_scenes_are_cocos_layout(tmp_path):
    from pycocotools.coco import COCO as Reader
    command("data.py", "scenes", "--out", tmp_path, "--n", 4)
    reader, scenes = Reader(str(tmp_path / "annotations" / "instances_train2017.json")), data.Scenes()
    assert len(reader.imgs) == 4 and (tmp_path / "val2017").is_dir()
    for i, entry in reader.imgs.items():
        picture, boxes, labels, masks = scenes.render(i)
        assert np.array_equal(data.read_image(tmp_path / "train2017" / entry["file_name"]), picture)
        for a, box, label, mask in zip(reader.imgToAnns[i], boxes, labels, masks):
            assert np.array_equal(reader.annToMask(a).astype(bool), mask) and a["bbox"][:2] == box[:2].tolist()
            assert reader.cats[a["category_id"]]["name"] == data.SCENE_CATEGORIES[label]
    ours = data.open_labelled("coco", tmp_path, "train")
    assert ours.boxes.tolist() == np.concatenate([scenes.render(i)[1] for i in range(4)]).tolist()
    assert np.array_equal(ours.mask(0), scenes.render(0)[3][0])


def write_pictures(folder, n, side=96):
    folder.mkdir(parents=True, exist_ok=True)
    scenes = data.Scenes()
    for i in range(n):
        cv2.imwrite(str(folder / f"{i:03d}.png"), cv2.resize(scenes.read(i)[..., ::-1], (side, side)))


def test_proposals_in_parts_and_after_a_kill_are_those_of_one_go(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 3)
    write_pictures(tmp_path / "pictures", 11)
    (tmp_path / "pictures" / "broken.jpg").write_bytes(b"not a picture")
    images = data.open_images("folder", tmp_path / "pictures")
    data.compute_proposals(images, tmp_path / "whole", workers=1)
    assert data.proposals_state(images, tmp_path / "whole") == "ready"
    data.compute_proposals(images, tmp_path / "parts", workers=1, part=(1, 2))
    assert data.proposals_state(images, tmp_path / "parts") == "missing"
    chunk = next((tmp_path / "parts").glob(".partial-*/*.npz"))
    stamp, real = chunk.stat().st_mtime_ns, data._search_chunk
    done = []
    monkeypatch.setattr(data, "_join", lambda *a: done.append(a))  # a kill before the joining
    data.compute_proposals(images, tmp_path / "parts", workers=1, part=(0, 2))
    assert done and chunk.stat().st_mtime_ns == stamp  # finished chunks are not done again
    monkeypatch.undo()
    monkeypatch.setattr(data, "CHUNK", 3)
    data.compute_proposals(images, tmp_path / "parts", workers=1)
    for name in ("boxes.npy", "offsets.npy", "names.txt"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    found = data.Proposals(tmp_path / "whole")
    assert len(found.names) == 11 and b"broken.jpg" not in found.names.tolist()
    for i in range(11):  # SoCo's filter, by the definition
        for x1, y1, x2, y2 in found[i].tolist():
            w, h = x2 - x1, y2 - y1
            assert min(w, h) >= 32 and 1 / 3 <= w / h <= 3 and 0.3 <= math.sqrt(w * h) / 96 <= 0.8 and 0 <= x1 and x2 <= 96
    monkeypatch.setitem(data.SEARCH, "long_side", 64)
    assert "long_side" in data.proposals_state(images, tmp_path / "whole")  # other settings: made again, never mixed
    foreign = json.loads((tmp_path / "whole" / "settings.json").read_text()) | {"method": "my own"}
    (tmp_path / "whole" / "settings.json").write_text(json.dumps(foreign))
    assert data.proposals_state(images, tmp_path / "whole") == "ready"  # somebody else's are taken as they are


def test_filter_relaxes_step_by_step():
    whole = [[0, 0, 100, 100], [0, 0, 300, 40], [0, 0, 40, 40], [0, 0, 20, 90]]
    for keep, level, kept in ((slice(0, 4), 0, [0]), (slice(1, 4), 1, [2]), (slice(1, 2), 2, [1]), (slice(3, 4), 3, None)):
        boxes, got = data.filter_proposals(np.float32(whole[keep]), 200, 300)
        assert got == level and boxes.tolist() == ([whole[i] for i in kept] if kept else [[0, 0, 300, 200]])


@needs_coco
def test_proposals_find_cocos_objects():
    """Recall of the ground-truth boxes that pass the filter, IoU >= 0.5, on 24 images; a full-size search has 0.986 on 128."""
    labelled, found = data.open_labelled("coco", COCO, "train"), []
    for i in range(24):
        image, truth = labelled.images.read(i), labelled.boxes[labelled.offsets[i]:labelled.offsets[i + 1]]
        truth, level = data.filter_proposals(truth, *image.shape[:2])
        if level == 0:
            boxes, _ = data.filter_proposals(data.selective_search(image), *image.shape[:2])
            found += torchvision.ops.box_iou(torch.tensor(truth), torch.tensor(boxes)).amax(1).ge(0.5).tolist()
    assert len(found) > 30 and np.mean(found) > 0.9


def test_views_carry_the_same_regions():
    """A picture whose colour is its position: under each box of view 2 lie the colours under the same box of view 1."""
    class Ramp(data.Images):
        def read(self, i):
            y, x = np.mgrid[0:200, 0:250]
            return np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)

    class Boxes:
        names, offsets, folder = np.array([b"a", b"b"]), np.array([0, 3, 6]), "memory"

        def __getitem__(self, i):
            return np.float32([[20, 30, 90, 110], [100, 50, 200, 150], [140, 20, 240, 80]])
    views = data.TwoViews(Ramp(".", ["a", "b"]), Boxes(), 128, 4, seed=1)
    for epoch in range(8):
        view1, view2, boxes1, boxes2 = views[epoch, 1]
        assert view1.shape == view2.shape == (128, 128, 3) and boxes1.shape == boxes2.shape == (4, 4) and boxes2.dtype == np.float32
        assert (boxes1 >= 0).all() and (boxes1 <= 128.01).all() and (boxes2 >= 0).all() and (boxes2 <= 128.01).all()
        for a, b in zip(boxes1, boxes2):
            spans = [[np.array([view[int(y1) + 1:int(y2) - 1, int(x1) + 1:int(x2) - 1, c].astype(int).ravel()[[0, -1]] for c in (0, 1)])
                      for x1, y1, x2, y2 in [box]][0] for view, box in ((view1, a), (view2, b))]
            low, high = (np.sort(s, axis=1) for s in spans)
            assert (high[:, 0] >= low[:, 0] - 6).all() and (high[:, 1] <= low[:, 1] + 6).all()  # inside, cut by the crop at most
            assert ((high[:, 1] - high[:, 0]) > 0.3 * (low[:, 1] - low[:, 0])).all()
        again = views[epoch, 1]
        assert all(np.array_equal(p, q) for p, q in zip((view1, view2, boxes1, boxes2), again))  # a function of the item alone


# ------------------------------------------------------------------------------------------------- runs, as a user types

@pytest.fixture(scope="session")
def scenes_run(tmp_path_factory):
    """The default command, once for all tests that look at its output: (folder of the run, root, what it printed)."""
    folder = tmp_path_factory.mktemp("scenes")
    began = time.monotonic()
    done = command("d3ssl.py", "--root", folder / "root", "--out", folder / "run")
    return folder / "run", folder / "root", done.stdout, time.monotonic() - began


def small(root, out, *words, steps=12, **kwargs):
    """A run of seconds: 64-pixel views, 8 images a step, on the scenes and proposals of `root`."""
    return command("d3ssl.py", "--root", root, "--out", out, "--size", 64, "--boxes", 2, "--batch-size", 8, "--epochs", 1,
                   "--max-steps", steps, *words, **kwargs)


def read_metrics(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def same_checkpoint(a, b):
    """Everything in two last.pt, to the bit; returns the first thing that differs, or None."""
    def walk(x, y, path):
        if isinstance(x, dict):
            return next((w for k in {**x, **y} for w in [walk(x.get(k), y.get(k), f"{path}.{k}")] if w), None)
        if torch.is_tensor(x):
            return None if torch.equal(x, y) else path
        return None if x == y else path
    return walk(*(torch.load(Path(run) / "last.pt", weights_only=True) for run in (a, b)), "last.pt")


def test_default_run_writes_what_it_says(scenes_run):
    run, _, printed, seconds = scenes_run
    assert seconds < 180 * (2 / min(2, os.cpu_count() or 1)), seconds
    assert "images/s" in printed and "left" in printed and f"python evaluate.py --ckpt {run}/last.pt" in printed
    state = torch.load(run / "backbone.pth", weights_only=True)
    missing, unexpected = torchvision.models.resnet18().load_state_dict(state, strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
    saved = torch.load(run / "last.pt", weights_only=True)
    assert all(torch.equal(state[k], saved["model"][f"student.backbone.{k}"]) for k in state)
    rows = read_metrics(run)
    steps = [row["step"] for row in rows]
    assert steps[0] == 1 and steps[1] == 20 and steps[-1] == saved["step"]
    assert set(rows[0]) == {"step", "epoch", "loss", "loss_dc", "loss_dp", "acc", "lr", "images_per_second", "wait"}


def test_a_finished_run_says_so(scenes_run):
    run, root, *_ = scenes_run
    before = (run / "last.pt").read_bytes()
    assert "finished" in command("d3ssl.py", "--root", root, "--out", run).stdout and (run / "last.pt").read_bytes() == before


KILLER = """
import os, signal, sys
import d3ssl, data
saves, real = [], os.fsync
def fsync(number):  # the n-th time that last.pt is being written, die in the middle of it
    if os.readlink(f"/proc/self/fd/{number}").endswith("last.pt.tmp"):
        saves.append(1)
        if len(saves) == int(sys.argv.pop(1) if not saves[1:] else 1):
            os.ftruncate(number, 1000)
            os.kill(os.getpid(), signal.SIGKILL)
    real(number)
os.fsync = fsync
d3ssl.Clock.minutes_since_save = lambda self: 6  # save at every step
sys.argv[0] = "d3ssl.py"
data.error_exit(d3ssl.main)
"""


def test_killed_runs_resume_to_the_same_bits(scenes_run, tmp_path):
    """SIGKILL inside the save and at a random time, other --workers after each: last.pt ends as in an uninterrupted run."""
    _, root, *_ = scenes_run
    small(root, tmp_path / "a")
    words = ["--root", root, "--out", tmp_path / "b", "--size", 64, "--boxes", 2, "--batch-size", 8, "--epochs", 1, "--max-steps", 12]
    killed = command("-c", KILLER, 4, *words, "--workers", 0, ok=False)
    assert killed.returncode == -signal.SIGKILL and torch.load(tmp_path / "b" / "last.pt", weights_only=True)["step"] == 3
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')  # what a kill leaves behind the checkpoint
    process = subprocess.Popen([sys.executable, "-c", KILLER, "99", *map(str, words), "--workers", "1"], cwd=HERE, stdout=subprocess.DEVNULL)
    deadline, wait = time.monotonic() + 120, np.random.default_rng(int(time.time())).uniform(0, 1)
    while torch.load(tmp_path / "b" / "last.pt", weights_only=True)["step"] < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(wait)
    process.kill()
    process.wait()
    small(root, tmp_path / "b", "--workers", 2)
    assert same_checkpoint(tmp_path / "a", tmp_path / "b") is None
    drop = lambda row: {k: v for k, v in row.items() if k not in ("images_per_second", "wait")}
    assert [drop(r) for r in read_metrics(tmp_path / "a")] == [drop(r) for r in read_metrics(tmp_path / "b")]


def test_sigterm_saves_on_all_ranks_and_the_run_goes_on(scenes_run, tmp_path):
    _, root, *_ = scenes_run
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29612", "d3ssl.py", "--root", str(root),
         "--out", str(tmp_path), "--size", "64", "--boxes", "2", "--batch-size", "8", "--epochs", "5"],
        cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert "stopped at step" in printed, printed
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] < 500
    wrong = command("d3ssl.py", "--root", root, "--out", tmp_path, "--size", 64, "--boxes", 2, "--batch-size", 8, "--epochs", 5, ok=False)
    assert wrong.returncode == 2 and "ranks 2, now 1" in wrong.stdout


@needs_coco
def test_training_reads_no_annotation(tmp_path):
    """Two runs on COCO images, one with annotations/ deleted, are byte-equal; baselines and objectives all run."""
    root = tmp_path / "coco"
    (root / "train2017").mkdir(parents=True)
    for path in sorted((COCO / "train2017").iterdir())[:16]:
        shutil.copy(path, root / "train2017")
    shutil.copytree(COCO / "annotations", root / "annotations")
    words = ["d3ssl.py", "--data", "coco", "--root", root, "--arch", "resnet18", "--size", 64, "--batch-size", 8, "--epochs", 1]
    command(*words, "--out", tmp_path / "a")
    shutil.rmtree(root / "annotations")
    command(*words, "--out", tmp_path / "b")
    assert (tmp_path / "a" / "last.pt").read_bytes() == (tmp_path / "b" / "last.pt").read_bytes()
    for name, more in (("image", ["--regions", "image"]), ("grid", ["--regions", "grid"]),
                       ("soco", ["--objective", "cosine", "--no-dp", "--augs", "cutout,jitter"]), ("hide", ["--prm", "hide"])):
        command(*words, "--out", tmp_path / name, *more)
        row = read_metrics(tmp_path / name)[-1]
        assert math.isfinite(row["loss"]) and (row["loss_dp"] == 0) == (name != "hide")


def test_mistakes_are_one_line_that_names_the_cure(scenes_run, tmp_path):
    run, root, *_ = scenes_run
    empty, pictures = tmp_path / "empty", tmp_path / "pictures"
    empty.mkdir()
    write_pictures(pictures, 2)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "last.pt").write_bytes((run / "last.pt").read_bytes()[:5000])
    scenes = ["--root", root, "--out"]
    cases = [(["--data", "coco", "--root", tmp_path / "nowhere"], "--root"), (["--data", "folder", "--root", empty], "no image"),
             (["--data", "folder", "--root", pictures, "--out", tmp_path / "x", "--proposals", tmp_path / "p"], "--batch-size"),
             (["--augs", "prc,foo"], "foo"), (["--augs", "rbj,jitter"], "jitter"), (["--regions", "grid", "--augs", "prc"], "--augs"),
             (["--arch", "vgg"], "vgg"), (["--batch-size", 1, *scenes, tmp_path / "x"], "--batch-size"),
             (["--batch-size", 2000, *scenes, tmp_path / "x"], "--batch-size"), ([*scenes, cut], "cannot be read"),
             (["--arch", "resnet34", *scenes, run], "--arch"), (["--lr", 7, *scenes, run], "--lr"), (["--size", 31], "--size")]
    script = "import sys, d3ssl, data\nfor words in eval(sys.argv.pop()):\n    sys.argv[1:] = words\n    try:\n        data.error_exit(d3ssl.main)" \
             "\n    except SystemExit as end:\n        print('code', end.code, file=sys.stderr, flush=True)"
    done = command("-c", script, repr([[str(w) for w in words] for words, _ in cases]))
    lines = [line for line in done.stdout.splitlines() if "error:" in line or line.startswith("code")]
    assert len(lines) == 2 * len(cases), done.stdout
    for (words, said), message, code in zip(cases, lines[::2], lines[1::2]):
        assert code == "code 2" and said in message, (words, message)
    assert not (tmp_path / "x").exists() and (cut / "last.pt").stat().st_size == 5000


def test_a_loss_that_is_not_finite_is_never_saved(scenes_run, tmp_path):
    _, root, *_ = scenes_run
    small(root, tmp_path, steps=2, ok=False)
    before = (tmp_path / "last.pt").read_bytes()
    script = "import sys, torch, data, d3ssl\nd3ssl.contrast = lambda z, *a: (z.sum(1) * float('nan'), z.sum(1) > 0)\n" \
             "sys.argv[0] = 'd3ssl.py'\ndata.error_exit(d3ssl.main)"
    done = command("-c", script, "--root", root, "--out", tmp_path, "--size", 64, "--boxes", 2, "--batch-size", 8, "--epochs", 1,
                   "--max-steps", 6, ok=False)
    assert done.returncode == 2 and "not finite" in done.stdout.splitlines()[-1] and (tmp_path / "last.pt").read_bytes() == before
