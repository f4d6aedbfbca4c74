/* json_c: json-c's header, with the two of its names out of the way that io/json.h uses itself.
 * Private to the io room. */
#ifndef IO_JSON_C_H
#define IO_JSON_C_H

#define json_type json_c_type
#define json_bool json_c_bool
#include <json-c/json.h>
#undef json_type
#undef json_bool

#endif
