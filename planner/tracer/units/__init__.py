"""Equal blocks of a model, traced once.

A *unit* is a submodule whose call may be traced once for several submodules; units that run the same kernels are of one *kind*.
The first unit of a kind is its *template*: it is traced as it is, between *gates*, identities that mark in the graph where it
begins and ends. Every other unit of the kind is traced as a *stand-in*, one kernel forward and one backward, in whose place
`splice` then copies the template's nodes. The graph that comes out is that of tracing the whole model, node for node; where
that is not certain, the whole model is traced.
"""
