// See parts.h.
#include "rows.h"

namespace baton {

void run_row_part(const Op* ops, long count, const RowView& rows, Range range) {
    run_rows(ops, count, rows, range);
}

}  // namespace baton
