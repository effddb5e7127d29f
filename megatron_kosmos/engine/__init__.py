"""Where model, data, optimizer and checkpoints meet: building, training, evaluating, converting, generating."""
