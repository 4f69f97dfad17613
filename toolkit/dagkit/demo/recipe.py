"""Every hyper-parameter of the bundled world's models, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Schedule:
    """How one network is optimised: AdamW, linear warm-up, flat, then cosine decay; an average of the weights is kept.

    Attributes:
        num_steps: steps in all.
        batch_size: scenes a step.
        learning_rate: its peak.
        num_warmup_steps: linear rise at the start.
        flat_share: share of the steps after which the decay begins.
        final_share: share of the peak that is left at the end.
        weight_decay: of AdamW.
        betas: of AdamW.
        gradient_clip: largest norm of the gradient.
        ema_decay: of the average of the weights, which is what ships.
        seed: of weights and data; each step draws from (seed, step), so a resumed run repeats an undisturbed one.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    num_warmup_steps: int = 100
    flat_share: float = 0.35
    final_share: float = 0.005
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0


@dataclass(frozen=True, slots=True)
class AutoencoderRecipe:
    """AutoencoderKL, 64 px to latents of 4x16x16; afterwards its decoder alone, on noisy latents."""

    channels: tuple[int, ...] = (16, 32, 64)
    norm_num_groups: int = 8
    kl_weight: float = 1e-4
    object_weight: float = 3.0
    gradient_loss_weight: float = 0.5
    decoder_latent_noise: float = 0.03
    schedule: Schedule = Schedule(640, 8, 2e-3, 30, 0.0, betas=(0.9, 0.98), weight_decay=0.0, ema_decay=0.98)
    decoder_schedule: Schedule = Schedule(
        2500, 8, 1.5e-3, 50, 0.4, betas=(0.9, 0.98), weight_decay=0.0, ema_decay=0.995, seed=1
    )


@dataclass(frozen=True, slots=True)
class BaseRecipe:
    """Text encoder and UNet, trained together on the frozen encoder's latents.

    Attributes:
        channels: of the UNet's blocks, at 16x16, 8x8 and 4x4.
        layers_per_block: the first value puts two cross-attention layers into the 16x16 block on the way down and
            three on the way up.
        min_snr_gamma: weight min(SNR, gamma) / SNR (Min-SNR, arXiv 2303.09556).
        object_weight: weight of a latent cell covered by an object relative to one of background, in the limit of no
            noise. It fades to 1 with the signal's power (alpha bar): where places are still open, an unequal weight
            would pull the prediction towards more objects than there are.
        high_noise_share: share of the timesteps drawn from the noisiest 40 %, where it is decided what stands where;
            the others are uniform.
        caption_dropout: share of scenes without a caption.
        repeat_share: share of those scenes in which objects repeat. Captioned scenes hold each object once, so
            classifier-free guidance leads away from repetition.
        num_objects_weights: of scenes with 1, 2 and 3 objects.
        weapon_probability: share of captioned scenes with a weapon.
        caption_weights: of named, class and hinted captions, in scenes with a weapon.
        look_alike_probability: share of scenes without a weapon in which one object resembles a weapon.
    """

    channels: tuple[int, ...] = (64, 96, 128)
    layers_per_block: tuple[int, ...] = (2, 1, 1)
    num_heads: int = 4
    norm_num_groups: int = 16
    text_width: int = 128
    num_text_layers: int = 2
    max_tokens: int = 16
    min_snr_gamma: float = 5.0
    object_weight: float = 4.0
    high_noise_share: float = 0.5
    caption_dropout: float = 0.12
    repeat_share: float = 0.75
    num_objects_weights: tuple[float, float, float] = (0.12, 0.4, 0.48)
    weapon_probability: float = 0.55
    caption_weights: tuple[float, float, float] = (0.5, 0.12, 0.38)
    look_alike_probability: float = 0.5
    schedule: Schedule = Schedule(1300, 256, 4e-4, flat_share=0.2, seed=6)


@dataclass(frozen=True, slots=True)
class JointRecipe:
    """Two text encoders and a joint-attention transformer of Stable Diffusion 3's kind, on the same latents.

    Scenes and captions are drawn as for the UNet.

    Attributes:
        num_layers: joint blocks.
        width: of both streams.
        num_heads: few, because each costs a softmax over all pairs of positions.
        text_width: of the first text encoder, which starts from the UNet's.
        num_text_layers: of both text encoders; the stream reads the last but one, the last serves the pooled text.
        second_width: of the second text encoder.
        max_tokens: of a caption.
        num_scenes: of the bank whose latents are computed once.
        bank_seed: scene i is drawn from (bank_seed, i).
        noise_mean: of the logit of the noise level, which is normal (arXiv 2403.03206).
        noise_deviation: its standard deviation.
        object_weight: weight of a latent cell covered by an object relative to one of background, without noise; it
            fades to 1 at full noise.
        class_weight: of the loss by which one block's image stream tells which object covers a cell, at first; it fades
            to zero over the first ``class_share`` of the steps.
        class_layer: that block.
        class_share: see ``class_weight``.
        kept_share: share of the cells that a step looks at, at random, in the first ``kept_until`` of the steps: half
            of them teach nearly as much at half the cost (arXiv 2306.09305).
        kept_until: see ``kept_share``.
    """

    num_layers: int = 5
    width: int = 160
    num_heads: int = 2
    text_width: int = 128
    num_text_layers: int = 3
    second_width: int = 32
    max_tokens: int = 16
    num_scenes: int = 48_000
    bank_seed: int = 99
    noise_mean: float = 0.4
    noise_deviation: float = 1.0
    object_weight: float = 3.0
    class_weight: float = 0.2
    class_layer: int = 2
    class_share: float = 0.5
    kept_share: float = 0.5
    kept_until: float = 0.75
    schedule: Schedule = Schedule(12_000, 32, 1e-3, 200, 0.5, ema_decay=0.999, seed=8)


@dataclass(frozen=True, slots=True)
class JudgeRecipe:
    """The judge.

    Attributes:
        reconstructed_share: share of the images that go through the autoencoder with noise on their latents.
        latent_noise: largest standard deviation of that noise; the latents have 1.
        presence_weight: of the loss of each object's presence, relative to that of the heat maps.
        background_weight: of the loss of the background.
    """

    reconstructed_share: float = 0.25
    latent_noise: float = 0.4
    presence_weight: float = 10.0
    background_weight: float = 0.3
    schedule: Schedule = Schedule(700, 48, 4e-3, 50, 0.2, ema_decay=0.98, seed=2)


@dataclass(frozen=True, slots=True)
class SamRecipe:
    """The small SAM.

    Attributes:
        reconstructed_share: share of the images that go through the autoencoder with noise on their latents.
        latent_noise: largest standard deviation of that noise; the latents have 1.
        box_slack: how far each side of a box may be off, relative to the box's size.
    """

    reconstructed_share: float = 0.25
    latent_noise: float = 0.3
    box_slack: float = 0.12
    schedule: Schedule = Schedule(1600, 8, 1e-3, 100, 0.2, ema_decay=0.99, seed=3)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The whole of it."""

    autoencoder: AutoencoderRecipe = field(default_factory=AutoencoderRecipe)
    base: BaseRecipe = field(default_factory=BaseRecipe)
    sd3: JointRecipe = field(default_factory=JointRecipe)
    judge: JudgeRecipe = field(default_factory=JudgeRecipe)
    sam: SamRecipe = field(default_factory=SamRecipe)
