"""Files -> arrays: images, class names, data sets, augmentation, preprocessing."""
