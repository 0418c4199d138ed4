"""A recipe that is done in seconds."""

TINY_RECIPE = """
data: {source: scenes, scenes: {size: [64, 80], num_train: 24, num_val: 16}}
model: {name: mobilenetv2_fcn, width: 0.25, depth: 0.5, num_exits: 4}
heads: {channel_reduction: [1], extra_blocks: [0], rapid_dilation: [false], segmentation_head: [fcn, deeplabv3]}
pretrain: {iterations: 45, batch_size: 4, learning_rate: 0.2, checkpoint_every: 10}
distill: {iterations: 15, batch_size: 4, learning_rate: 0.2, checkpoint_every: 6}
evaluate: {pixel_thresholds: [0.2, 0.3, 0.4, 0.5, 0.7]}
search: {max_drops_pp: [0.1, 1.0], grid: {num_image_thresholds: 8}}
compute: {device: cpu, num_workers: 0}
"""
