/* SPDX-License-Identifier: Apache-2.0 */
/*
 * UMEM: the memory that packets live in, as a memfd.
 *
 * A memfd, because it can be handed to another process: the owner registers it
 * with the kernel (which pins its pages), the application maps the same pages.
 * It is sealed against shrinking, so that mapping it can't end in SIGBUS.
 *
 *      0          frame_size                       fill_frames * frame_size
 *      +----------+----------+-- ... --+-----------+-- ... --+
 *      | frame 0  | frame 1  |         | frame     |         |
 *      | receive                       | transmit            |
 *      +----------+----------+-- ... --+-----------+-- ... --+
 */
#ifndef SL_UMEM_H
#define SL_UMEM_H

#include <stdint.h>

/* cffi: begin */

/*
 * A descriptor of size bytes of zeroes, or -errno.  With huge, of huge pages;
 * size is then a multiple of the huge page size, and -ENOMEM says that there are
 * not enough.
 */
int sl_umem_create(uint64_t size, int huge);

/*
 * Maps size bytes for reading and writing, all pages present.  -EPERM: not
 * sealed against shrinking; -EINVAL: smaller than size.
 */
int sl_umem_map(int fd, uint64_t size, uint8_t **area);

/*
 * The same with more bytes (a multiple of 2 MiB) of private memory behind it, in one
 * piece of address space; *at is where those begin, from area.  They cost memory only
 * where they are written to.  Unmapped as *at + more bytes.
 */
int sl_umem_map_with(int fd, uint64_t size, uint64_t more, uint8_t **area, uint64_t *at);
void sl_umem_unmap(uint8_t *area, uint64_t size);

/* cffi: end */

#endif /* SL_UMEM_H */
