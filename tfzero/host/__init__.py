"""The only folder with private names of TensorFlow and Keras."""
