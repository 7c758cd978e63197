"""Metrics of restored images: PSNR, SSIM, FADE, and those of pyiqa."""
