"""From files to training samples: decoding, depth, haze synthesis and augmentation."""
