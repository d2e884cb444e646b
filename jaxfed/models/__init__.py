"""Models as pure functions: where ``jaxfed.Model`` comes from.

* :mod:`jaxfed.models.layers`: convolution and pooling that stay fast inside a compiled loop (pure JAX);
* :mod:`jaxfed.models.recurrent`: LSTM, GRU and simple recurrence that do (pure JAX);
* :mod:`jaxfed.models.advice`: names the layers that do not;
* :mod:`jaxfed.models.rnn`: the recurrences in the place of Flax's RNN, Linen and NNX;
* :mod:`jaxfed.models.adapters`: a ``Model`` from a Flax module or from plain functions;
* :mod:`jaxfed.models.reference`: the models of the papers, by name.

The last three import Flax, so they are imported by their own names and not from here.
"""
