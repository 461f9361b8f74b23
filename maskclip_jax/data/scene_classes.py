"""The 66 names of the emoji scenes: 60 objects, then six kinds of stuff. The index of a name is its label."""

SCENE_OBJECTS: tuple[str, ...] = tuple(
    "dog cat horse cow sheep pig bird fish elephant giraffe lion monkey rabbit turtle snake frog "
    "car bus truck train bicycle motorcycle airplane boat ship rocket tractor house castle tree palm flower "
    "cactus mushroom apple banana pizza cake bottle chair sofa bed television laptop clock umbrella ball guitar book "
    "person child robot ghost sun moon star cloud snowman key hat".split()
)
SCENE_STUFF: tuple[str, ...] = ("grass", "sky", "sand", "water", "snow", "road")
SCENE_CLASSES: tuple[str, ...] = SCENE_OBJECTS + SCENE_STUFF
