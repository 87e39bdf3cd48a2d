"""Real pictures: `images` decodes, `layouts` and `records` find rows, `sources` makes samples.

`stream` puts them into the order of training. Language models read other things than pictures
and live elsewhere; here is everything between a disk and a batch.
"""
