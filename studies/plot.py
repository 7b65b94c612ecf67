"""Curves and points as a picture, drawn with PIL: axes, ticks, a key."""
import math

from PIL import Image, ImageDraw, ImageFont

COLOURS = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000'       # Okabe and Ito's
LEFT, TOP, BOTTOM = 90, 50, 70          # pixels around the axes
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
        return self.start + share * (self.end - self.start)

    def ticks(self):
        if self.log:
            return log_ticks(self.low, self.high)
        return ticks(self.low, self.high)


def draw_curves(path, curves, points={}, xlabel='step', ylabel='', log='', size=(960, 600)):
    """Saves a picture of curves {name: [(x, y), ...]} and points {name: [(x, low, y, high), ...]} with their intervals.
    One name has one colour. log: the axes that are logarithmic, 'x', 'y' or 'xy'. path None: only returns it."""
    font, picture = ImageFont.load_default(18), Image.new('RGB', size, 'white')
    draw = ImageDraw.Draw(picture)
    names = list(dict.fromkeys([*curves, *points]))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}

    # the key stands to the right of the axes
    key_width = 60 + round(max((font.getlength(name) for name in names), default=0))
    right, bottom = size[0] - key_width, size[1] - BOTTOM
    xs, ys = [], []
    for group in [*curves.values(), *points.values()]:
        for x, *heights in group:
            xs.append(x)
            ys += heights
    across = Axis(xs, LEFT, right, 'x' in log)
    up = Axis(ys, bottom, TOP, 'y' in log)

    def write(x, y, text, anchor):
        draw.text((x, y), text, fill='black', font=font, anchor=anchor)

    # axes
    for value in up.ticks():
        y = up(value)
        draw.line((LEFT, y, right, y), fill='#dddddd')
        write(LEFT - 8, y, short(value), 'rm')
    for value in across.ticks():
        x = across(value)
        draw.line((x, bottom, x, bottom + 6), fill='black')
        write(x, bottom + 10, short(value), 'mt')
    draw.rectangle((LEFT, TOP, right, bottom), outline='black')
    write((LEFT + right) / 2, size[1] - 22, xlabel, 'mm')
    write(8, TOP / 2, ylabel, 'lm')

    # what is shown, and the key
    for i, (name, colour) in enumerate(colours.items()):
        height = TOP + 15 + 24 * i
        write(right + 48, height, name, 'lm')
        if name in curves:
            draw.line([(across(x), up(y)) for x, y in curves[name]], fill=colour, width=3)
            draw.line((right + 8, height, right + 40, height), fill=colour, width=3)
        if name in points:
            draw.circle((right + 24, height), 5, fill=colour)
        for x, low, y, high in points.get(name, []):
            x = across(x)
            draw.line((x, up(low), x, up(high)), fill=colour, width=2)
            draw.circle((x, up(y)), 5, fill=colour)
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
