"""The network: a timm backbone, a head, and pixel features for association."""
