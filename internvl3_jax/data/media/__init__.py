"""Images and videos: opening, tiling, frames, augmentation."""
