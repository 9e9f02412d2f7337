/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The Internet checksum (RFC 1071).
 *
 * Sums are kept in 64 bits over words in memory order.  The ones' complement
 * sum does not care about byte order as long as one stays with it, so nothing is
 * swapped and the folded result is stored as it is.
 */
#ifndef SL_CHECKSUM_H
#define SL_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */

/*
 * Adds length bytes to sum.  An odd last byte is padded with zero, so only the
 * last piece may be odd.  Cannot overflow below 2^32 calls of 64 KiB.
 */
uint64_t sl_sum(const void *data, size_t length, uint64_t sum);

/* Folds to 16 bits and complements: what goes into the header. */
uint16_t sl_fold(uint64_t sum);

/* cffi: end */

#endif /* SL_CHECKSUM_H */
