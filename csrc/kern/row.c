/* Rows without vectors beyond those that every processor has. */
#include "kern/row_plain.h"

const kern_row_ops kern_plain_row = KERN_ROW_OPS;
