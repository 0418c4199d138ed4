"""The programs that people run on a session: folders of images, large images, videos, a service."""
