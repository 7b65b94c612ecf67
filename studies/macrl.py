"""
Masked contrastive representation learning (arXiv:2211.06012): without a teacher. One branch sees a quarter of a changed
view, the other half of a plain one; both draw what they do not see and should say the same of the image.

    python studies/macrl.py --steps 300 --out_dir out/macrl             # both losses
    python studies/macrl.py --steps 300 --out_dir out/l1 --contrast 0   # one; --reconstruct 0 leaves the other
    python mim_pretrain.py --init out/macrl/model.pt --eval             # also a --teacher, and others' --init

Known here is its abstract: unlike masks and augmentation, InfoNCE of the encoder's features through a projector with a
memory bank, L1 of both decoders' outputs, end to end. What that leaves open is marked `ours`.
"""
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

STRONG, WEAK = .25, .5          # ours: share of the patches that is seen, MAE's and more
TEMPERATURE, EMBED = .2, 64     # ours: MoCo v2's, and the width of what is compared
QUEUE = 1024                    # ours: keys of 16 batches; the encoder of long ago was another


@dataclass
class Config(run.Run):
    contrast: int = run.option(1, 'weight of InfoNCE', high=1)          # ours: both losses count alike
    reconstruct: int = run.option(1, 'weight of the L1 loss', high=1)
    init: str = ''              # no flags: mim_pretrain.py applies what comes out, and goes on from it
    eval: bool = False
    image: str = ''
    drop_path: float = 0.
    grad_clip: float = 3.


RECIPES = {'nano': dict(batch_size=64, steps=1600, lr=2e-3)}     # ours


def strong_view(images, u):
    """A crop, maybe mirrored, in other colours: ours. images uint8 [B, 3, H, W], u [B, 8] uniform -> 0 to 255."""
    side = (.3 + .7 * u[:, :1]).sqrt()                              # 30% of the area or more
    centre = (1 - side) * (2 * u[:, 1:3] - 1)                       # [B, 2], of -1 to 1
    mirror = torch.where(u[:, 3:4] < .5, -1., 1.)
    scale = torch.diag_embed(torch.cat((side * mirror, side), dim=1))
    affine = torch.cat((scale, centre[:, :, None]), dim=2)          # [B, 2, 3]
    places = F.affine_grid(affine, images.shape, align_corners=False)
    crop = F.grid_sample(images.float(), places, padding_mode='border', align_corners=False)
    coloured = crop * (.5 + u[:, 4:7, None, None])                  # a gain for each of red, green and blue
    grey = crop.mean(1, keepdim=True).expand_as(crop)
    return torch.where(u[:, 7:, None, None] < .2, grey, coloured).clamp(0, 255)


def info_nce(queries, keys, queue):
    """Each query's own key against other images' and older ones: [B, C], [B, C], [Q, C] of unit length.
    Ours: among older ones alone the own key could be told by its newness."""
    logits = queries @ torch.cat((keys, queue)).T / TEMPERATURE     # [B, B + Q]
    return F.cross_entropy(logits, torch.arange(len(queries), device=queries.device))


def hidden_l1(predictions, targets, keep):
    """Mean distance at the patches that were not seen (ours: MAE's). [B, N, C], [B, N, C], [B, n]."""
    distances = (predictions.float() - targets).abs().mean(-1)      # [B, N]
    return distances.scatter(1, keep, 0.).sum() / (distances.numel() - keep.numel())


class Macrl(nn.Module):
    """Ours: the branches share all weights, and both learn; a decoder of one block."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.encoder = M.ViT(config)
        self.projector = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, EMBED))
        self.register_buffer('queue', F.normalize(torch.randn(QUEUE, EMBED), dim=1))
        self.hidden = nn.Parameter(torch.zeros(D))                  # stands for every hidden patch
        self.register_buffer('places', M.sincos_positions(D, self.encoder.grid)[:, 1:])
        self.decoder = M.Block(config)
        self.draw = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 3 * config.patch_size ** 2))

    def branch(self, images, keep):
        """A view and the patches [B, n] seen of it -> (what the image is compared by [B, EMBED], L1 loss).
        Ours: a branch draws its own view, each patch with mean 0 and variance 1."""
        tokens = self.encoder.features(self.encoder.normalize(images), keep=keep)
        tokens = tokens[:, self.encoder.num_before:].float()                        # [B, n, D]
        summary = F.normalize(self.projector(tokens.mean(1)).float(), dim=1)

        x = self.hidden.expand(len(tokens), self.places.shape[1], -1)               # [B, N, D]
        x = x.scatter(1, keep[:, :, None].expand_as(tokens), tokens) + self.places
        return summary, hidden_l1(self.draw(self.decoder(x)), Pixels(self.encoder.grid).of(images), keep)

    def forward(self, images, position, seed):
        """-> (InfoNCE, L1) of images at these positions of a run. The weak branch's keys go into the queue."""
        N = self.encoder.grid ** 2
        order = kept_patches(seed, position, N, drop_tokens=0)                      # all, in random order
        strong = strong_view(images, data.uniform(seed, 'strong', position, 8))
        queries, l1_strong = self.branch(strong, order[:, :round(STRONG * N)])
        keys, l1_weak = self.branch(images, order[:, -round(WEAK * N):])
        contrast = info_nce(queries, keys, self.queue)
        self.queue.copy_(torch.cat((keys.detach(), self.queue))[:QUEUE])
        return contrast, (l1_strong + l1_weak) / 2


def train(cfg):
    """Leaves model.pt, which is the encoder alone, loss.png, log.jsonl and result.json."""
    _, world, device, _ = run.setup(cfg)
    cfg.out_dir = cfg.out_dir or f'out/macrl-{cfg.size}'
    config = run.vit_config(cfg, mask_token=False)
    if world > 1 or config.image_size == config.patch_size or not cfg.contrast + cfg.reconstruct:
        raise run.Refused('needs one process, several patches, and --contrast 1 or --reconstruct 1')
    train_set = data.open_data(cfg.data, 'train')
    val_set = data.open_data(cfg.data, 'val')
    run.settle_steps(cfg, train_set)
    if run.finished(cfg):
        return

    torch.manual_seed(cfg.seed)     # of all but the encoder
    model = run.to_device(M.init_weights(Macrl(config), cfg.seed, gain=1.9), cfg, device)   # as mim_pretrain.py's
    optimizer = run.make_optimizer(model, cfg)
    start, _ = run.resume(cfg.out_dir, model, optimizer, cfg)
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
            run.save_checkpoint(cfg.out_dir, step + 1, model, optimizer, cfg)
            if stopping:
                log.leave(step + 1)

    run.save_model(model.encoder, f'{cfg.out_dir}/model.pt')
    metrics = run.probe(run.pooled_features(model.encoder), train_set, val_set, config.image_size, run.NUM_PROBE, cfg, device)
    last = dict(loss=loss.item(), contrast=contrast.item(), l1=l1.item())
    log.finish(model.encoder, 'training loss', {}, **last, **metrics)
    run.report_broken(train_set, val_set)


if __name__ == '__main__':
    run.main(train, Config, RECIPES)
