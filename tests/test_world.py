"""The built-in world: a pure function of the index, whose labels say what its pixels show."""
import hashlib

import pytest
import torch

import data
from data import World


def test_hash_of_the_first_scenes():
    """Changing what the world draws means a new WORLD_VERSION, and measuring the README's numbers again.
    Hashed are 64 scenes' integers, semantic maps and captions; unnamed repeats a part."""
    batch = World().batch(torch.arange(64), 32, want=('semantic', 'captions'))
    text = '\n'.join(batch['captions'])
    fields = batch.keys() - {'images', 'captions', 'unnamed'}
    parts = [batch[name].long().numpy().tobytes() for name in sorted(fields)]
    assert hashlib.sha256(b''.join(parts) + text.encode()).hexdigest()[:12] == data.WORLD_HASH


def test_uniform_is_uniform():
    """Ten equal bins of 100,000 numbers hold 10,000 each within five standard deviations, along both axes."""
    for u in (data.uniform(0, 'test', torch.arange(100_000), 1), data.uniform(0, 'test', torch.arange(1), 100_000)):
        counts = torch.histc(u, 10, 0, 1)
        assert (counts - 10_000).abs().max() < 5 * (10_000 * .9) ** .5


def test_scene_depends_on_its_index_alone():
    """A scene is the same in any company, at any place of the batch."""
    position = torch.tensor([5, 900, 41])
    together, alone = World().batch(position, 32, seed=1), World().batch(position[1:2], 32, seed=1)
    assert torch.equal(together['images'][1], alone['images'][0]) and together['captions'][1] == alone['captions'][0]


@pytest.mark.parametrize('kind', ['train', 'val', 'heldout'])
def test_splits_share_no_scene(kind):
    other = {'train': 'val', 'val': 'heldout', 'heldout': 'train'}[kind]
    position = torch.arange(64)
    assert not set(World(kind).index(position, 0).tolist()) & set(World(other).index(position, 0).tolist())


def test_no_training_scene_shows_a_held_out_pair():
    """Kind and colour of every object of 20,000 scenes."""
    scenes = World().scenes(torch.arange(20_000))
    held_out = data.grammar('cpu')['held_out']
    assert held_out.sum() == 24 and not held_out[scenes['kind'], scenes['colour']][scenes['valid']].any()


def test_boxes_are_tight_around_single_objects():
    """The box of a lone object is that of the semantic map's thing pixels."""
    batch = World(objects=1).batch(torch.arange(32), 64, want=('semantic', 'boxes'))
    for semantic, box in zip(batch['semantic'], batch['boxes'][:, 0]):
        rows, columns = (semantic >= data.NUM_STUFF).nonzero(as_tuple=True)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_semantic_map_names_the_objects():
    """Every visible object's kind is in the map, and no other kind is."""
    batch = World().batch(torch.arange(64), 48, want=('semantic', 'boxes'))
    for semantic, kind, num_visible in zip(batch['semantic'], batch['kind'], batch['num_visible']):
        assert set((semantic[semantic >= data.NUM_STUFF] - data.NUM_STUFF).tolist()) == set(kind[num_visible > 0].tolist())


def test_mirror_scenes_are_symmetric():
    """All but the light: the semantic map equals its reflection."""
    world = World()
    position = (world.scenes(torch.arange(500))['layout'] == data.LAYOUTS.index('mirror')).nonzero()[:16, 0]
    semantic = world.batch(position, 32, want=('semantic',))['semantic']
    same = (semantic == semantic.flip(2)).float().mean()
    assert len(position) == 16 and same > .93       # overlapping pairs are painted in order, not mirrored


def test_unique_repeats_its_scenes():
    """unique=10 visits the same ten scenes in every epoch."""
    index = World(unique=10).index(torch.arange(30), seed=3).view(3, 10)
    assert torch.equal(index.sort(1).values, torch.arange(10).expand(3, 10))


def test_resolutions_show_the_same_scene():
    """An image at 32 px is close to the one at 128 px, averaged down."""
    small, large = (World().batch(torch.arange(8), size)['images'].float() for size in (32, 128))
    averaged = torch.nn.functional.avg_pool2d(large, 4)
    assert torch.corrcoef(torch.stack([small.flatten(), averaged.flatten()]))[0, 1] > .9


def test_captions_name_the_layout_and_no_part():
    captions = ' '.join(World().some_captions(500))
    assert ' in a row' in captions and not any(part in captions.split() for part in data.PARTS if part != 'none')


@pytest.mark.parametrize('options', [dict(objects=0), dict(objects=7), dict(fine=500), dict(unique=-1)])
def test_knobs_out_of_range_are_refused(options):
    with pytest.raises(data.Refused, match='outside'):
        World(**options)
