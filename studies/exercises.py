"""
The exercises of the README: one change each, and what it does, paired by seed with the code as it is.

    python studies/exercises.py                                      # all, 3 seeds of 1,200 steps
    python studies/exercises.py 'mask ratio' --steps 50 --seeds 2    # one, quickly

A change is a flag, or lines replaced in a copy of the code; compare.py runs and judges it.
"""
import compare
import grid

MSE = '    losses = (predictions - targets).square().mean(-1)'
SIZE = "    'deep':  dict(width=64,   depth=8,  heads=2,  mlp_width=256,  patch_size=4,  image_size=32),\n"
RECIPE = "    'deep':  dict(batch_size=64, steps=1600, lr=2e-3, save_every=400),\n"
HOUSE = "    'heart':     lambda x, y, r, a: (abs(x) < .7) & (y < .8) & (y > -.95 + 1.1 * abs(x)),"

EXERCISES = {  # name: flags, lines (file, what it starts with, what to write instead)
    'random mask': ('--mask random', []),
    'mask ratio': ('--mask_ratio .75', []),
    'MSE': ('', [('mim_pretrain.py', '    losses = -F.cosine_similarity(predictions, targets, dim=-1)', MSE)]),
    'another teacher layer': ('--target_layer 4', []),
    'a new size': ('--size deep', [('model.py', "    'mini':  dict(", SIZE + "    'mini':  dict("),
                                   ('mim_pretrain.py', "    'micro': dict(", RECIPE + "    'micro': dict(")]),
    'a new shape': ('', [('data.py', "    'heart':     lambda x, y, r, a: heart(1.2 * x, .15 - 1.2 * y),", HOUSE)]),
    'pixels as target': ('--target pixels', []),
}       # own photos: study.py photographs


def change(code, lines):
    """The code with the lines replaced; each has to be there once."""
    code = dict(code)
    for name, line, instead in lines:
        num = code[name].count(line)

        # the code has moved on since the exercise was written
        if num != 1:
            grid.refuse(f'{name} has {num} times the line {line.strip()!r}; the exercise needs it once')
        code[name] = code[name].replace(line, instead)
    return code


def main():
    parser = grid.make_parser(__doc__)
    parser.add_argument('names', nargs='*', metavar='NAME', help=', '.join(EXERCISES))
    parser.add_argument('--steps', type=int, default=1200)
    parser.add_argument('--seeds', type=int, default=3)
    args = parser.parse_args()
    compare.check_seeds(args.seeds)
    for name in args.names:
        if name not in EXERCISES:
            grid.refuse(f'{name}: not one of {", ".join(EXERCISES)}')

    code, flags = compare.code_of(grid.ROOT), ['--steps', str(args.steps)]
    for name in args.names or EXERCISES:
        own_flags, lines = EXERCISES[name]
        changed = change(code, lines), flags + own_flags.split()
        print(f'\n{name}: {own_flags} {", ".join(file for file, _, _ in lines)}')
        compare.compare(changed, (code, flags), (name, 'as it is'), args.seeds, args.jobs)


if __name__ == '__main__':
    main()
