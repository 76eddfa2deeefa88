"""Rows between GPUs that reach each other's memory: kernels that store straight into the peers' buffers.

The phases of one exchange; at each arrow all ranks meet (`meet`):

       counts              every rank writes its row of counts into every rank's table
    -> layout, send        the table says where each choice's row lies on its expert's rank, and there it is stored,
                           in 8 bits if it travels so (`narrow`)
    -> (experts)           on the rows where they lie, or in their own dtype again (`widen`)
       give_back           each result is stored at the token's own rank, in the place of its choice
    -> settle              the weighted sum of a token's results, in float32 and in the order of its choices

A meeting also proves that every rank is done reading what comes to be overwritten after it, so that one set of buffers
serves all layers: a rank reads the table, the rows and their sources before the meeting that follows `give_back`, and
sums the results before it comes to the next meeting after which others store results.
"""
