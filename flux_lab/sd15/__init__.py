"""The generation before FLUX: the UNet of Stable Diffusion 1.5, its two schedulers, its checkpoints and its pipeline.

Axes that are not in the glossary of `flux_lab`:

    time_dim          width of the time vector: 4 * channels of the first level
    text_dim          width of the text encoder's token vectors (768 for CLIP ViT-L)
    tokens            positions of a feature map: height * width
    length            text tokens: 77
"""
