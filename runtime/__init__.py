"""What a run needs beside the training itself: processes, its folder, checkpoints, and how it may end."""
