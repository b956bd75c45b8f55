"""What the ops of several families need."""
