"""Rows between GPUs that reach each other's memory: kernels that store straight into the peers' buffers.

The phases of one exchange on three ranks of two slots each; after each arrow all ranks meet (`meet`):

    counts       every rank writes its row of counts into every rank's table
      -> layout, send    the table says where each choice's row lies on its expert's rank, and there it is stored
      -> (experts)
         give_back       each result is stored at the token's own rank, in the place of its choice
      -> settle          the weighted sum of a token's results, in float32 and in the order of its choices

A phase's meeting also proves that every rank is done reading what the next phase overwrites, so that one set of buffers
serves all layers: the table is not read after `give_back`, the rows are not read after the experts, which come before
it, and the results are summed before the next exchange's rows may be answered.
"""
