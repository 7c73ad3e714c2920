"""`dist-pca report`: runs shown in one HTML file, with pictures that their networks are run for."""
