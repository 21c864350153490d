"""Boxes and masks -> views: the region augmentations of the paper's section 4.1, the composite of Eq. 8, colour.

    python augment.py --data coco --root data/coco --out views.png      a contact sheet: look before you train

It needs torch alone: copy it into your project. The contact sheet and the command line import the rest.
Everything is batched and runs on the device of its inputs, without a loop over images and without reading a value
back. Images are (B, 3, H, W), normalised, so that 0 is ImageNet's mean colour; boxes (B, K, 4) float32 xyxy in
pixels of that view, x2/y2 exclusive; masks (B, 1, H, W) float32 with 1 = visible: an augmented view is image * mask.
`size` is (H, W) everywhere. Every random function draws from the `generator` it is given, of the inputs' device.
"""
import argparse
import math
import tempfile
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in every checkpoint that we compare with

# Ranges of the region augmentations: section 4.1, but PRC's threshold and RBJ's ranges are ours.
PRC_SHARE = (0.2, 0.5)      # of a box's area that is cut out
PRC_THRESHOLD = 0.5         # a box of which a larger share is hidden already is made visible first
PRM_SCALE = (0.2, 0.6)      # area of a rectangle on a box's border, as a share of the box's; about half lies inside
PRM_RATIO = (3 / 4, 4 / 3)  # its width / height
RBJ_SCALE = (0.8, 1.0)      # of a box's width and height
RBJ_SHIFT = 0.1             # of its centre, at most, as a share of its sides


@cache
def constant(values, device):
    """A tuple of numbers or rows as a float32 tensor, copied to `device` once: a copy makes the host wait for it."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


# --------------------------------------------------------------------------------------------------- rectangles, masks

def uniform(shape, low, high, like, generator=None):
    """U(low, high) of `shape` on the device of `like`, float32; low and high: numbers, or tensors that broadcast."""
    return low + (high - low) * torch.rand(shape, generator=generator, device=like.device)


def whole_pixels(boxes, size):
    """R_i: boxes (..., 4) rounded to whole pixels and clipped to the image; float32 that holds integers."""
    limit = constant((size[1], size[0], size[1], size[0]), boxes.device)
    rounded = (boxes + 0.5).floor()  # not round(): half to even would not commute with a shift
    return torch.minimum(rounded.clamp(min=0), limit)


def rectangle_mask(rectangles, size):
    """(..., H, W) bool: the pixels of each whole-pixel rectangle (..., 4)."""
    y, x = (torch.arange(n, device=rectangles.device) for n in size)
    x1, y1, x2, y2 = rectangles[..., None].unbind(-2)
    rows, columns = (y >= y1) & (y < y2), (x >= x1) & (x < x2)
    return rows[..., :, None] & columns[..., None, :]


def boxes_mask(boxes, size):
    """Eq. 6: m, (B, 1, H, W), 1 in the union of the boxes (B, K, 4)."""
    return rectangle_mask(whole_pixels(boxes, size), size).any(1, keepdim=True).float()


# ---------------------------------------------------------------------------------- region augmentations (section 4.1)

def proposal_random_cutout(mask, boxes, share=PRC_SHARE, threshold=PRC_THRESHOLD, generator=None):
    """PRC, section 4.1: cut a part out of every proposal, from the largest proposal to the smallest.

    R_i are the whole pixels of box i, c the share of them that is hidden already. If c > threshold, R_i is made visible
    and c = 0. Then s ~ U(share); if s > c, a rectangle of area (s - c)|R_i| with R_i's aspect ratio is hidden, placed
    uniformly inside R_i. Not in the paper: the value of `threshold`, that `share` is one of areas, and the subtraction
    of c (from the authors' follow-up at ICLR 2024, "Mind Your Augmentation").

    Args: mask (B, 1, H, W), 1 = visible; boxes (B, K, 4). Returns a new mask (B, 1, H, W)."""
    size, dtype = mask.shape[-2:], mask.dtype
    boxes = whole_pixels(boxes, size)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    boxes = boxes.gather(1, area.argsort(dim=1, descending=True, stable=True)[..., None].expand_as(boxes))
    shares = uniform(boxes.shape[:2], *share, boxes, generator)
    places = uniform((*boxes.shape[:2], 2), 0, 1, boxes, generator)
    visible = mask[:, 0] > 0.5
    for i in range(boxes.shape[1]):
        box = boxes[:, i]
        region = rectangle_mask(box, size)
        corner, extent = box[:, :2], box[:, 2:] - box[:, :2]
        hidden = 1 - (region & visible).sum((1, 2)) / extent.prod(1).clamp(min=1)
        recover = hidden > threshold
        visible = visible | (region & recover[:, None, None])
        still_to_hide = (shares[:, i] - hidden.masked_fill(recover, 0)).clamp(min=0)  # s - c
        cut = (extent * still_to_hide.sqrt()[:, None]).round()
        place = corner + (places[:, i] * (extent - cut + 1)).floor().minimum(extent - cut)
        visible = visible & ~rectangle_mask(torch.cat([place, place + cut], 1), size)
    return visible[:, None].to(dtype)


def proposal_random_mask(boxes, size, scale=PRM_SCALE, ratio=PRM_RATIO, reading="reveal", generator=None):
    """PRM, section 4.1: which parts of the proposals' surroundings are visible, from random directions.

    Each box has one rectangle of area s|R_i|, s ~ U(scale), aspect (width / height) log-uniform in `ratio`, centred on
    the border of R_i in a uniformly random direction from its centre. reading="reveal" (the literal one: "add partial
    background information"): the boxes and the rectangles are visible. reading="hide": everything is visible but those
    rectangles outside the boxes. Not in the paper: one rectangle per box, on the border, log-uniform in its aspect.

    Args: boxes (B, K, 4); size (H, W). Returns the mask (B, 1, H, W), 1 = visible."""
    boxes = whole_pixels(boxes, size)
    extent, centre = boxes[..., 2:] - boxes[..., :2], (boxes[..., 2:] + boxes[..., :2]) / 2
    shape = boxes.shape[:2]
    area = extent.prod(-1) * uniform(shape, *scale, boxes, generator)
    aspect = uniform(shape, math.log(ratio[0]), math.log(ratio[1]), boxes, generator).exp()
    angle = uniform(shape, 0, 2 * math.pi, boxes, generator)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    reach = (extent / 2 / direction.abs().clamp(min=1e-6)).amin(-1, keepdim=True)  # from the centre to the border
    half = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], -1) / 2
    spot = centre + reach * direction
    rectangles = boxes_mask(torch.cat([spot - half, spot + half], -1), size)
    inside = boxes_mask(boxes, size)
    return torch.maximum(inside, {"reveal": rectangles, "hide": 1 - rectangles}[reading])


def restricted_box_jitter(boxes, size, scale=RBJ_SCALE, shift=RBJ_SHIFT, generator=None):
    """RBJ, section 4.1: jittered boxes (B, K, 4), never larger than the original while scale <= 1. Width and height are
    multiplied by U(scale), the centre moves by U(-shift, shift) of the side; the result is clipped to the view `size`
    (H, W). Not in the paper: both ranges."""
    extent, centre = boxes[..., 2:] - boxes[..., :2], (boxes[..., 2:] + boxes[..., :2]) / 2
    factors = uniform(extent.shape, *scale, boxes, generator)
    shifts = uniform(extent.shape, -shift, shift, boxes, generator)
    half, centre = extent * factors / 2, centre + extent * shifts
    limit = constant((size[1], size[0], size[1], size[0]), boxes.device)
    return torch.minimum(torch.cat([centre - half, centre + half], -1).clamp(min=0), limit)


def box_jitter(boxes, size, p=0.5, generator=None):
    """Not in the paper: a box jitter in SoCo's manner, for Table 5. With probability p a box (B, K, 4) has its centre
    shifted and its sides scaled by up to 10 % of the side; it may grow; clipped to the view `size` (H, W)."""
    chosen = torch.rand(boxes.shape[:2] + (1,), generator=generator, device=boxes.device) < p
    return torch.where(chosen, restricted_box_jitter(boxes, size, (0.9, 1.1), 0.1, generator), boxes)


def random_cutout(mask, boxes, share=(0.1, 0.3), p=0.5, generator=None):
    """Not in the paper: a cutout in SoCo's manner, for Tables 5 and 6. With probability p a box (B, K, 4) loses a
    square of area share U(share), centred uniformly in the box and clipped to it. Returns the new mask (B, 1, H, W)."""
    size = mask.shape[-2:]
    low, high = whole_pixels(boxes, size).split(2, -1)
    shape = (*boxes.shape[:2], 1)
    area = (high - low).prod(-1, keepdim=True) * uniform(shape, *share, boxes, generator)
    chosen = uniform(shape, 0, 1, boxes, generator) < p
    half, centre = area.sqrt() / 2 * chosen, uniform(low.shape, low, high, boxes, generator)
    square = torch.cat([torch.maximum(centre - half, low), torch.minimum(centre + half, high)], -1)
    return mask * (1 - boxes_mask(square, size))


# ------------------------------------------------------------------------------ de-positioning (section 4.2, Eqs. 6-8)

def shift_boxes(boxes, size, generator=None):
    """b^ = b + t: all boxes (B, K, 4) of an image move by one integer offset t, uniform over those that keep every box
    inside the view `size` (H, W). Returns the shifted boxes (B, K, 4) and t (B, 2) int64, (dx, dy)."""
    low = -boxes[..., :2].amin(1).floor()
    high = (constant((size[1], size[0]), boxes.device) - boxes[..., 2:].amax(1).ceil()).maximum(low)
    offset = uniform(low.shape, low, high + 1, boxes, generator).floor().minimum(high)
    return boxes + offset.repeat(1, 2)[:, None], offset.long()


def composite(images, backgrounds, shifted_mask, offset):
    """Eq. 8: x3 = C(x2, m, x_b, m^): `images` moved by t, pasted on `backgrounds` where `shifted_mask` is 1; an exact
    pixel copy. m is not needed: PRC changes m inside the boxes alone, so m^ of Eq. 7 lies in the moved m.

    Args: images, backgrounds (B, 3, H, W); shifted_mask (B, 1, H, W), inside the moved image; offset (B, 2) integer
    dx, dy."""
    height, width = images.shape[2:]
    y = (torch.arange(height, device=images.device) - offset[:, 1:]) % height  # what wraps around is never pasted
    x = (torch.arange(width, device=images.device) - offset[:, :1]) % width
    rows = images.gather(2, y[:, None, :, None].expand_as(images))
    moved = rows.gather(3, x[:, None, None, :].expand_as(images))
    return torch.where(shifted_mask > 0.5, moved, backgrounds)


# -------------------------------------------------------------------------------------------------------------- colour

class Colour(NamedTuple):
    """Strengths and probabilities of colour augmentation. Not in the paper: MoCo v2's, as in DenseCL's COCO recipe."""
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1  # of a full turn
    p_jitter: float = 0.8
    p_grey: float = 0.2
    p_blur: float = 0.5
    sigma: tuple = (0.1, 2.0)  # of the blur, in pixels at 224; scaled with the view


LUMA = (0.299, 0.587, 0.114)
RGB_TO_YIQ = (LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
YIQ_TO_RGB = tuple(map(tuple, torch.tensor(RGB_TO_YIQ, dtype=torch.float64).inverse().tolist()))


def colour_augment(images, colour=Colour(), generator=None):
    """Colour jitter, random grey and Gaussian blur of images (B, 3, H, W) in [0, 1], each with its own draws.

    Brightness, contrast, saturation, hue (a rotation in YIQ) and grey, in this fixed order, are affine in a pixel's
    colour: one 3x3 matrix and offset per sample, one product; contrast's pivot, the mean grey after brightness, follows
    from the mean colour. Blur is one product with a band matrix along each axis. Fixed order and one clamp: as DALI."""
    matrix, offset = colour_transform(images.mean((2, 3)), colour, generator)
    pixels = torch.baddbmm(offset[..., None], matrix, images.flatten(2)).clamp_(0, 1).view(images.shape)
    return blur(pixels, colour, generator)


def colour_transform(mean, colour=Colour(), generator=None):
    """Matrix (B, 3, 3) and offset (B, 3) of each sample's colour change; `mean` (B, 3) is its mean colour."""
    batch, device = len(mean), mean.device
    draws = torch.rand((6, batch), generator=generator, device=device)
    u_jitter, u_grey = draws[4:]
    jittered, grey = u_jitter < colour.p_jitter, u_grey < colour.p_grey
    u_brightness, u_contrast, u_saturation, u_hue = (2 * draws[:4] - 1) * jittered  # U(-1, 1), or 0: no change
    brightness = 1 + colour.brightness * u_brightness
    contrast = 1 + colour.contrast * u_contrast
    saturation = (1 + colour.saturation * u_saturation).masked_fill(grey, 0.0)
    angle = 2 * math.pi * colour.hue * u_hue

    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turn = torch.stack([zero + 1, zero, zero, zero, cos, -sin, zero, sin, cos], -1).view(batch, 3, 3)
    hue = constant(YIQ_TO_RGB, device) @ turn @ constant(RGB_TO_YIQ, device)
    luma, identity = constant(LUMA, device), torch.eye(3, device=device)
    recolour = hue @ torch.lerp(luma.expand(3, 3), identity, saturation.view(-1, 1, 1))
    pivot = (mean @ luma) * brightness * (1 - contrast)  # contrast's share of the mean grey, the same in all channels
    return recolour * (brightness * contrast).view(-1, 1, 1), recolour.sum(2) * pivot[:, None]


def blur(images, colour=Colour(), generator=None):
    """Gaussian blur of images (B, C, H, W) with probability colour.p_blur, sigma uniform in colour.sigma."""
    batch, _, height, width = images.shape
    u_sigma, u_blur = torch.rand((2, batch), generator=generator, device=images.device)
    sigma = (colour.sigma[0] + (colour.sigma[1] - colour.sigma[0]) * u_sigma) * width / 224
    sigma = torch.where(u_blur < colour.p_blur, sigma, 1e-3).view(-1, 1, 1)  # so narrow that it is the identity

    def band(n):  # (B, 1, n, n): row i holds the weights of output pixel i, at the border renormalised
        i = torch.arange(n, device=images.device, dtype=torch.float32)
        weight = torch.exp(-((i[:, None] - i) / sigma) ** 2 / 2)
        return (weight / weight.sum(2, keepdim=True))[:, None]
    return band(height) @ images @ band(width).transpose(2, 3)


def to_float(pixels):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1]."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 255


def normalise(images):
    """[0, 1] RGB (B, 3, H, W) -> zero mean, unit variance per channel."""
    mean, std = (constant(values, images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


# ---------------------------------------------------------------------------------------------------------- the views

class Views(NamedTuple):
    """What D3SSL.forward reads and a contact sheet shows. `boxes` made the masks; RoIAlign reads the jittered `rois`.
    What de-positioning makes (m_hat, x3, boxes3, rois3) is empty without it."""
    x1: torch.Tensor         # (B, 3, H, W) view 1, for the contact sheet alone
    x2: torch.Tensor         # (B, 3, H, W) view 2; the teacher sees it neither cut nor masked
    x1_hat: torch.Tensor     # (B, 3, H, W) Eq. 2
    x2s_hat: torch.Tensor    # (B, 3, H/2, W/2) Eq. 2
    m_hat: torch.Tensor      # (B, 1, H, W) Eq. 7
    x3: torch.Tensor         # (B, 3, H, W) Eq. 8
    boxes1: torch.Tensor     # (B, K, 4) b_i in x1
    boxes2: torch.Tensor     # (B, K, 4) b_i in x2; in x2s their coordinates are halved
    boxes3: torch.Tensor     # (B, dp_boxes, 4) b^_i in x3, of the first dp_boxes of the K
    rois1: torch.Tensor      # (B, K, 4)
    rois2: torch.Tensor      # (B, K, 4)
    rois3: torch.Tensor      # (B, dp_boxes, 4)


AUGS = ("prc", "prm", "rbj", "cutout", "jitter")


def make_views(batch, options, generator=None, colour=Colour()):
    """Section 4: from what the loader brings to what the encoders see, on the batch's device. Returns Views.

    Args: batch: view1, view2 (B, H, W, 3) uint8, boxes1, boxes2 (B, K, 4); options: d3ssl.Config, or any object with
    its fields augs, prm, dp, dp_boxes, prc_share, prc_threshold, prm_scale, prm_ratio, rbj_scale and rbj_shift.
    De-positioning moves the first dp_boxes of the K boxes, whose order is random."""
    view1, view2, boxes1, boxes2 = batch
    size = view1.shape[1:3]
    x1, x2 = (normalise(colour_augment(to_float(view), colour, generator)) for view in (view1, view2))
    x2s = F.avg_pool2d(x2, 2)
    x1_hat = x1 * region_mask(boxes1, size, options, generator)                                        # Eq. 2
    x2s_hat = x2s * region_mask(boxes2 / 2, x2s.shape[2:], options, generator, is_view2s=True)
    rois1 = jitter_rois(boxes1, size, options, generator)
    rois2 = jitter_rois(boxes2, size, options, generator)
    m_hat = x3 = boxes3 = rois3 = boxes1.new_empty(0)
    if options.dp:  # last: without it all that is above stays the same
        m_hat, x3, boxes3 = de_position(x2, boxes2[:, :options.dp_boxes], options, generator)
        rois3 = jitter_rois(boxes3, size, options, generator)
    return Views(x1, x2, x1_hat, x2s_hat, m_hat, x3, boxes1, boxes2, boxes3, rois1, rois2, rois3)


def de_position(x2, boxes, options, generator=None):
    """Eqs. 6-8 for boxes (B, k, 4) of x2 (B, 3, H, W), on view 2 of the next image of the batch as background.
    Returns m^ (B, 1, H, W), x3 (B, 3, H, W) and b^ (B, k, 4)."""
    size, backgrounds = x2.shape[2:], x2.roll(-1, 0)                                                   # x_b
    moved, offset = shift_boxes(boxes, size, generator)
    m = boxes_mask(moved, size)  # Eq. 6's m, shifted: whole offsets move whole pixels
    m_hat = proposal_random_cutout(m, moved, options.prc_share, options.prc_threshold, generator)      # Eq. 7
    return m_hat, composite(x2, backgrounds, m_hat, offset), moved                                     # Eq. 8


def region_mask(boxes, size, options, generator=None, is_view2s=False):
    """The mask (B, 1, H, W) of Eq. 2 for one view, size (H, W), with boxes (B, K, 4) in its pixels: the product of
    PRC's and PRM's, as far as options.augs names them. "cutout" is applied to view 2s alone."""
    mask = boxes.new_ones((len(boxes), 1, *size))
    if "prc" in options.augs:
        mask = proposal_random_cutout(mask, boxes, options.prc_share, options.prc_threshold, generator)
    if "cutout" in options.augs and is_view2s:
        mask = random_cutout(mask, boxes, generator=generator)
    if "prm" in options.augs:
        mask = mask * proposal_random_mask(boxes, size, options.prm_scale, options.prm_ratio, options.prm, generator)
    return mask


def jitter_rois(boxes, size, options, generator=None):
    """The boxes (B, K, 4) that RoIAlign reads: jittered as options.augs says, or as they are."""
    if "rbj" in options.augs:
        boxes = restricted_box_jitter(boxes, size, options.rbj_scale, options.rbj_shift, generator)
    if "jitter" in options.augs:
        boxes = box_jitter(boxes, size, generator=generator)
    return boxes


def parse_augs(text):
    """'prc,prm,rbj' -> a tuple of names of AUGS, in their order; 'none' -> (). Raises argparse.ArgumentTypeError."""
    names = [] if text == "none" else text.split(",")
    if unknown := set(names).difference(AUGS):
        raise argparse.ArgumentTypeError(f"{min(unknown) or 'an empty name'} is none of {', '.join(AUGS)}, none")
    return tuple(name for name in AUGS if name in names)


# --------------------------------------------------------------------------------------------------- the contact sheet

COLOURS = ["#ffd400", "#00e5ff", "#ff4fd8", "#7cff4f", "#ff8c1a", "#b18cff", "#ffffff", "#ff5050"]


def contact_sheet(views, tile=224):
    """A PIL picture, a row per image of `views` (Views): x1, x2, x1^, x2s^, m^ and x3 with their boxes."""
    from PIL import ImageDraw
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import draw_bounding_boxes, make_grid
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    m_hat = normalise(views.m_hat.expand(-1, 3, -1, -1))
    columns = {"x1": (views.x1, views.boxes1, views.boxes1), "x2": (views.x2, views.boxes2, views.boxes2),
               "x1^ (Eq. 2)": (views.x1_hat, views.boxes1, views.rois1),
               "x2s^ (Eq. 2)": (views.x2s_hat, views.boxes2 / 2, views.rois2 / 2),
               "m^ (Eq. 7)": (m_hat, views.boxes3, views.boxes3), "x3 (Eq. 8)": (views.x3, views.boxes3, views.rois3)}
    tiles = []
    for row in range(len(views.x1)):
        for images, boxes, rois in columns.values():
            image = F.interpolate((images[row] * std + mean).clamp(0, 1)[None], size=(tile, tile))[0]
            pixels, scale = (image * 255).round().byte(), tile / images.shape[-1]
            for some, width in ((boxes[row], 3), (rois[row], 1)):
                pixels = draw_bounding_boxes(pixels, some * scale, colors=COLOURS * len(some), width=width)
            tiles.append(pixels)
    grid = make_grid(tiles, nrow=len(columns), padding=4, pad_value=48)
    sheet = to_pil_image(F.pad(grid, (0, 0, 14, 14), value=48))
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        draw.text((4 + column * (tile + 4), 2), title, fill="white")
    legend = "thick boxes: made the masks; thin: jittered, read by RoIAlign; grey: hidden; white in m^: moved onto x_b"
    draw.text((4, sheet.height - 15), legend, fill="white")
    return sheet


def main():
    from data import (Parser, Proposals, TwoViews, UserError, atomic, compute_proposals, make_loader, open_images,
                      positive, rng, whole_number)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=("scenes", "coco", "voc", "openimages-mini", "folder"), default="scenes")
    add("--root", help="folder of the data set (default data/DATA)")
    add("--proposals", help="folder of proposals (default: search in the images that are shown)")
    add("--out", default="views.png", help="PNG to write (default views.png)")
    add("--rows", type=partial(whole_number, least=2), default=6, help="images to show (default 6)")
    add("--size", type=positive, help="side of a view in pixels, even (default: scenes 112, else 224)")
    add("--boxes", type=positive, default=4, help="K, boxes per image (default 4)")
    add("--dp-boxes", type=positive, default=1, help="how many of them de-positioning moves (default 1)")
    add("--augs", type=parse_augs, default=("prc", "prm", "rbj"), help="region augmentations, as in d3ssl.py")
    add("--prm", choices=("reveal", "hide"), default="reveal", help="PRM's reading, as in d3ssl.py")
    add("--seed", type=whole_number, default=0)
    parser.set_defaults(dp=True, prc_share=PRC_SHARE, prc_threshold=PRC_THRESHOLD, prm_scale=PRM_SCALE,
                        prm_ratio=PRM_RATIO, rbj_scale=RBJ_SCALE, rbj_shift=RBJ_SHIFT)
    args = parser.parse_args()
    args.size = args.size or (112 if args.data == "scenes" else 224)
    if args.dp_boxes > args.boxes or args.size % 2:
        raise UserError(f"--dp-boxes is at most --boxes {args.boxes}, --size is even: view 2s has half of it")
    images = open_images(args.data, args.root)
    if args.data != "scenes":
        images.names = images.names[rng("sheet", args.seed).permutation(len(images))]
    with tempfile.TemporaryDirectory() as folder:
        if args.proposals is None:
            images.names = images.names[:args.rows]
            compute_proposals(images, folder, workers=2)
        dataset = TwoViews(images, Proposals(args.proposals or folder), args.size, args.boxes, seed=args.seed)
        batch = next(iter(make_loader(dataset, [[(0, i) for i in range(len(dataset))][:args.rows]], workers=0)))
    sheet = contact_sheet(make_views(batch, args, torch.Generator().manual_seed(args.seed)))
    with atomic(args.out) as file:
        sheet.save(file, "PNG")
    print(f"wrote {args.out}: {len(batch[0])} images, {sheet.width} x {sheet.height} pixels")


if __name__ == "__main__":
    from data import error_exit
    error_exit(main)
