/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Numbers that the loader draws for each load.
 *
 * They are no macros given to the compiler, so that one compilation serves every
 * load (xdp/bytecode_cache.py).  The compiler sees a 64-bit load of a mark that
 * it can neither split nor fold; the loader puts the number in the mark's place
 * (xdp/bytecode.py) before the verifier sees it.
 */
#ifndef SLUICE_CONSTANT_H
#define SLUICE_CONSTANT_H

#include "abi.h"

#define LOADED_CONSTANT(mark)                                          \
	({                                                             \
		u64 loaded_constant;                                   \
		asm("%0 = %1 ll" : "=r"(loaded_constant) : "i"(mark)); \
		loaded_constant;                                       \
	})

/* marks frames that carry metadata */
#define SLUICE_COOKIE ((u32)LOADED_CONSTANT(SLUICE_MARK_COOKIE))
/* of the hashes that choose buckets and sets */
#define SLUICE_SALT LOADED_CONSTANT(SLUICE_MARK_SALT)

#endif /* SLUICE_CONSTANT_H */
