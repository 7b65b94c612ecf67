"""Curves, points and bands as a picture, drawn with PIL: axes, ticks, a key."""
import math

from PIL import Image, ImageDraw, ImageFont

COLOURS = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000'       # Okabe and Ito's
RAMP = (253, 190, 75), (205, 70, 100), (60, 15, 110)        # small to large: yellow, red, violet
LEFT, TOP, BOTTOM = 90, 50, 70          # pixels around the axes
FINER = 2                               # drawn so many times as large, then reduced: lines without steps
UNITS = (1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k'), (1, '')


class Axis:
    """From numbers to pixels; `start` is the pixel at the low end. log: logarithmic."""

    def __init__(self, values, start, end, log):
        self.log, self.start, self.end = log, start, end
        values = [self.scale(x) for x in values] or [0, 1]
        low, high = min(values), max(values)
        margin = .05 * (high - low) or .5
        self.low = low - margin
        self.high = high + margin

    def scale(self, x):
        return math.log10(x) if self.log else x

    def __call__(self, x):
        share = (self.scale(x) - self.low) / (self.high - self.low)
        return FINER * (self.start + share * (self.end - self.start))

    def ticks(self):
        if self.log:
            return log_ticks(self.low, self.high)
        return ticks(self.low, self.high)


def ramp(names):
    """{name: colour}, from the first to the last of things that have an order."""
    colours = {}
    for i, name in enumerate(names):
        place = 2 * i / max(1, len(names) - 1)
        part = min(1, int(place))
        mixed = [round(a + (b - a) * (place - part)) for a, b in zip(RAMP[part], RAMP[part + 1])]
        colours[name] = '#%02x%02x%02x' % tuple(mixed)
    return colours


def draw_curves(path, curves, points={}, xlabel='step', ylabel='', log='', size=(960, 600), thin={}, bands={},
                colours={}):
    """Saves a picture of curves {name: [(x, y), ...]}, of many thin ones {name: [curve, ...]}, of points
    {name: [(x, low, y, high), ...]} with their intervals, and of bands {name: [(x, low, high), ...]}.
    One name has one colour. log: the axes that are logarithmic, 'x', 'y' or 'xy'. path None: only returns it."""
    font = ImageFont.load_default(18 * FINER)
    picture = Image.new('RGB', (FINER * size[0], FINER * size[1]), 'white')
    draw = ImageDraw.Draw(picture, 'RGBA')
    names = list(dict.fromkeys([*thin, *curves, *points]))
    own = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    colours = own | {name: colours[name] for name in names if name in colours}

    # the key stands to the right of the axes
    key_width = 60 + round(max((font.getlength(name) for name in names), default=0) / FINER)
    right, bottom = size[0] - key_width, size[1] - BOTTOM
    many = [curve for group in thin.values() for curve in group]
    xs, ys = [], []
    for group in [*curves.values(), *points.values(), *bands.values(), *many]:
        for x, *heights in group:
            xs.append(x)
            ys += heights
    across = Axis(xs, LEFT, right, 'x' in log)
    up = Axis(ys, bottom, TOP, 'y' in log)

    def write(x, y, text, anchor):
        draw.text((x, y), text, fill='black', font=font, anchor=anchor)

    def line(places, colour, width):
        if len(places):
            draw.line(places, fill=colour, width=FINER * width, joint='curve')

    def dot(x, y, colour):
        draw.circle((x, y), 5 * FINER, fill=colour)

    # axes
    edge, floor, ceiling = FINER * right, FINER * bottom, FINER * TOP
    for value in up.ticks():
        y = up(value)
        line((FINER * LEFT, y, edge, y), '#dddddd', 1)
        write(FINER * (LEFT - 8), y, short(value), 'rm')
    for value in across.ticks():
        x = across(value)
        line((x, floor, x, floor + 6 * FINER), 'black', 1)
        write(x, floor + 10 * FINER, short(value), 'mt')
    draw.rectangle((FINER * LEFT, ceiling, edge, floor), outline='black', width=FINER)
    write(FINER * (LEFT + right) / 2, FINER * (size[1] - 22), xlabel, 'mm')
    write(FINER * 8, ceiling / 2, ylabel, 'lm')

    # bands lie below, thin lines below thick ones
    for name, band in bands.items():
        upper = [(across(x), up(high)) for x, low, high in band]
        lower = [(across(x), up(low)) for x, low, high in reversed(band)]
        draw.polygon(upper + lower, fill=colours.get(name, '#888888') + '40')
    for name, group in thin.items():
        for curve in group:
            line([(across(x), up(y)) for x, y in curve], colours[name], 1)

    # what is shown, and the key
    for i, (name, colour) in enumerate(colours.items()):
        height = ceiling + FINER * (15 + 24 * i)
        write(edge + 48 * FINER, height, name, 'lm')
        if name in curves or name in thin:
            line((edge + 8 * FINER, height, edge + 40 * FINER, height), colour, 3)
        if name in curves:
            line([(across(x), up(y)) for x, y in curves[name]], colour, 3)
        if name in points:
            dot(edge + 24 * FINER, height, colour)
        for x, low, y, high in points.get(name, []):
            x = across(x)
            line((x, up(low), x, up(high)), colour, 2)
            dot(x, up(y), colour)
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    if path:
        picture.save(path)
    return picture


def draw_panels(path, panels):
    """Pictures of one size in two columns."""
    if not panels:
        return
    width, height = panels[0].size
    columns = min(2, len(panels))
    sheet = Image.new('RGB', (columns * width, math.ceil(len(panels) / columns) * height), 'white')
    for i, picture in enumerate(panels):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    sheet.save(path)


def ticks(low, high):
    """Five or so round numbers from low to high."""
    power = 10 ** math.floor(math.log10((high - low) / 4))
    for factor in (1, 2, 5, 10):
        step = power * factor
        if (high - low) / step <= 6:
            break
    first, last = math.ceil(low / step), math.floor(high / step)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low, high):
    """Round numbers from 10^low to 10^high: powers of ten, with others between them where there is room."""
    decades = high - low
    if decades <= .3:
        return ticks(10 ** low, 10 ** high)
    factors = range(1, 10) if decades <= .7 else (1, 2, 5)
    if decades > 3:
        factors = (1,)
    numbers = []
    for power in range(math.floor(low), math.ceil(high) + 1):
        numbers += [factor * 10. ** power for factor in factors]
    return [x for x in numbers if low <= math.log10(x) <= high]


def short(x):
    """A tick's number: 0.25, 800, 20k, 1.6M."""
    for unit, name in UNITS:
        if abs(x) >= unit or unit == 1:
            return f'{float(f"{x / unit:.6g}"):g}{name}'
