"""The cloud: runs the stock model on transformed weights, for devices it learns nothing readable from."""
