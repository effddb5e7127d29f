"""Pictures: decoded, resized, cropped and normalized for the vision tower."""
