"""Dense prediction on NYUv2, Cityscapes or generated scenes: segmentation, depth, normals."""
