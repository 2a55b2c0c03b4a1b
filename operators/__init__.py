"""What runs on images, and the runner inside a job."""
