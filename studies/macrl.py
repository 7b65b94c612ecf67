"""
Masked contrastive representation learning (arXiv:2211.06012), without a teacher. One branch sees a quarter of a changed
view, the other half of a plain one; both draw what they do not see, and should say the same of the image. Known here
is the abstract: unlike masks and augmentation, InfoNCE of the encoder's features through a projector with a memory
bank, L1 of both decoders' outputs, end to end. What that leaves open is marked `ours`.

    python studies/macrl.py --steps 300 --out_dir out/macrl             # both losses
    python studies/macrl.py --steps 300 --out_dir out/l1 --contrast 0   # one; --reconstruct 0 leaves the other
    python mim_pretrain.py --init out/macrl/model.pt --eval             # also a --teacher, and others' --init
"""
import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data                                 # noqa: E402
import model as M                           # noqa: E402
import run                                  # noqa: E402
from clip_train import kept_patches         # noqa: E402
from mim_pretrain import Pixels             # noqa: E402

RECIPES = {'nano': dict(batch_size=64, steps=1600, lr=2e-3)}            # ours
TEMPERATURE, EMBED = .2, 64     # ours: MoCo v2's, and the width of what is compared
QUEUE, MOMENTUM = 512, .99      # ours: keys of 8 batches, and how slow the copy is that makes them


@dataclass
class Config(run.Run):
    contrast: int = run.option(1, 'weight of InfoNCE', high=1)          # ours: both losses count alike
    reconstruct: int = run.option(1, 'weight of the L1 loss', high=1)
    init: str = ''              # no flags: mim_pretrain.py applies what comes out, and goes on from it
    eval: bool = False
    image: str = ''
    drop_path: float = 0.
    grad_clip: float = 3.


def strong_view(images, u):
    """A crop in other colours: ours. images uint8 [B, 3, H, W], u [B, 6] uniform -> float, 0 to 255."""
    side = (.3 + .7 * u[:, :1]).sqrt()                              # 30% of the area or more
    centre = (1 - side) * (2 * u[:, 1:3] - 1)                       # [B, 2], of -1 to 1
    affine = torch.cat((torch.diag_embed(side.expand(-1, 2)), centre[:, :, None]), dim=2)       # [B, 2, 3]
    places = F.affine_grid(affine, images.shape, align_corners=False)
    crop = F.grid_sample(images.float(), places, padding_mode='border', align_corners=False)
    gains = .5 + u[:, 3:, None, None]                               # of red, green and blue
    return (crop * gains).clamp(0, 255)


def info_nce(queries, keys, queue):
    """Each query's own key among its batch's (ours) and older ones. [B, C], [B, C], [Q, C] of unit length."""
    logits = queries @ torch.cat((keys, queue)).T / TEMPERATURE     # [B, B + Q]
    return F.cross_entropy(logits, torch.arange(len(queries), device=queries.device))


class Macrl(nn.Module):
    """Ours: the branches share their weights, but keys are of a slow copy, MoCo's: quick ones outrun the queue."""

    def __init__(self, config, seed):
        super().__init__()
        D = config.width
        self.encoder = M.init_weights(M.ViT(config), seed, gain=1.9)                # as mim_pretrain.py's
        norm = nn.BatchNorm1d(EMBED, affine=False, track_running_stats=False)       # ours: no image like all others
        self.projector = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, EMBED), norm)
        self.slow = copy.deepcopy(nn.ModuleList([self.encoder, self.projector])).requires_grad_(False)
        self.register_buffer('queue', torch.zeros(QUEUE, EMBED))
        self.hidden = nn.Parameter(torch.zeros(D))                                  # stands for every hidden patch
        self.register_buffer('places', M.sincos_positions(D, self.encoder.grid)[:, 1:])
        self.decoder = M.Block(config)                                              # ours: one is enough
        self.draw = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 3 * config.patch_size ** 2))

    def look(self, encoder, projector, images, keep):
        """What is said of the patches [B, n] that are seen [B, n, D], and what the image is compared by [B, EMBED]."""
        tokens = encoder.features(encoder.normalize(images), keep=keep)[:, encoder.num_before:].float()
        return tokens, F.normalize(projector(tokens.mean(1)).float(), dim=1)

    def reconstruct(self, tokens, images, keep):
        """L1 of the hidden patches, drawn after tokens [B, n, D]. Ours: each with mean 0 and variance 1."""
        x = self.hidden.expand(len(tokens), self.places.shape[1], -1)               # [B, N, D]
        x = x.scatter(1, keep[:, :, None].expand_as(tokens), tokens) + self.places
        distances = (self.draw(self.decoder(x)).float() - Pixels(self.encoder.grid).of(images)).abs().mean(-1)
        return distances.scatter(1, keep, 0.).sum() / (distances.numel() - keep.numel())

    def forward(self, images, position, seed):
        """-> (InfoNCE, L1) of images at these positions of a run. Ours: a branch draws its own view."""
        N = self.encoder.grid ** 2
        order = kept_patches(seed, position, N, drop_tokens=0)                      # all, in random order
        seen_strong = order[:, :N // 4]                                             # ours: MAE's share
        seen_weak = order[:, N // 2:]                                               # ours: other patches, and more
        strong = strong_view(images, data.uniform(seed, 'strong', position, 6))
        tokens_strong, queries = self.look(self.encoder, self.projector, strong, seen_strong)
        tokens_weak, _ = self.look(self.encoder, self.projector, images, seen_weak)
        l1 = self.reconstruct(tokens_strong, strong, seen_strong) + self.reconstruct(tokens_weak, images, seen_weak)

        with torch.no_grad():
            quick = [*self.encoder.parameters(), *self.projector.parameters()]
            torch._foreach_lerp_([*self.slow.parameters()], quick, 1 - MOMENTUM)
            _, keys = self.look(*self.slow, images, seen_weak)
        contrast = info_nce(queries, keys, self.queue[self.queue.any(dim=1)])       # what is filled of it
        self.queue.copy_(torch.cat((keys, self.queue))[:QUEUE])
        return contrast, l1 / 2


def train(cfg):
    """Leaves model.pt, which is the encoder alone, loss.png, log.jsonl and result.json."""
    _, world, device, _ = run.setup(cfg)
    cfg.out_dir = cfg.out_dir or f'out/macrl-{cfg.size}'
    config = run.vit_config(cfg, mask_token=False)
    if world > 1 or config.image_size == config.patch_size or cfg.batch_size == 1 or not cfg.contrast + cfg.reconstruct:
        raise run.Refused('needs one process, several images and patches, and --contrast 1 or --reconstruct 1')
    train_set, val_set = [data.open_data(cfg.data, split) for split in ('train', 'val')]
    run.settle_steps(cfg, train_set)
    if run.finished(cfg):
        return
    torch.manual_seed(cfg.seed)     # of all but the encoder
    model = run.to_device(Macrl(config, cfg.seed), cfg, device)
    optimizer = run.make_optimizer(model, cfg)
    about = run.describe(train_set, val_set)
    start, _ = run.resume(cfg.out_dir, model, optimizer, cfg, about=about)
    log = run.Log(cfg, start, device)
    batches = data.batches(train_set, cfg.batch_size, config.image_size, start, cfg.steps, cfg.seed, device,
                           cfg.workers)
    for step, batch in zip(range(start, cfg.steps), log.watch(run.ahead(batches, device))):
        for group in optimizer.param_groups:
            group['lr'] = run.lr_at(step, cfg) * group['lr_scale']
        contrast, l1 = model(batch['images'], batch['position'], cfg.seed)
        loss = cfg.contrast * contrast + cfg.reconstruct * l1
        loss.backward()
        log.update(optimizer, run.clip_gradients(model, cfg.grad_clip))
        optimizer.zero_grad(set_to_none=True)
        if log.due(step):
            log.write(step, loss=loss.detach(), contrast=contrast.detach(), l1=l1.detach())
        stopping = log.stopping()
        if step + 1 < cfg.steps and (stopping or (step + 1) % cfg.save_every == 0):
            run.save_checkpoint(cfg.out_dir, step + 1, model, optimizer, cfg, about=about)
            if stopping:
                log.leave(step + 1)

    run.save_model(model.encoder, f'{cfg.out_dir}/model.pt')
    encode = run.pooled_features(model.encoder)
    metrics = run.probe(encode, train_set, val_set, config.image_size, run.NUM_PROBE, cfg, device)
    log.finish(model.encoder, 'training loss', {}, loss=loss.item(), **metrics)
    run.report_broken(train_set, val_set)


if __name__ == '__main__':
    run.main(train, Config, RECIPES)
