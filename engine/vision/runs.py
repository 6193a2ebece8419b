"""How many patches go through a tower at once."""

PAGE = 16                   # patches of a page of K and V; a picture begins on one
MOST_PATCHES = 10080        # of a run: a picture of 1120 soft tokens, or 16 frames of 70
MOST_VALUES = 768 * MOST_PATCHES    # of their patches, which the host sends


def run_patches(tower):
    """Patches of a run: MOST_PATCHES, fewer where they are large, and at least the largest picture; whole pages."""
    return whole_pages(max(min(MOST_PATCHES, MOST_VALUES // tower.patch_width), tower.most_patches))


def whole_pages(n_patches):
    """What so many patches of a picture take of a run."""
    return -(-n_patches // PAGE) * PAGE
