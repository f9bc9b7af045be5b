//! A guest that drives an 82540EM by itself: it sends two frames by turns for ever, counts what
//! comes, and adds it up. Also used by the tests of the `cofferdam` crate.

#![allow(dead_code, clippy::unwrap_used)] // Each test file uses a part of it.

/// Guest physical addresses of its rings and buffers; nothing of it is above.
pub const RINGS: std::ops::Range<u64> = 0x20_0000..0x24_0000;
/// Bytes of a frame.
pub const FRAME_BYTES: usize = 64;
/// Where the first of the two frames, an ARP request, has the number of the frame.
pub const NUMBER_AT: usize = 48;
/// What the guest prints for each frame that it received.
pub const RECEIVED: u8 = b'R';
/// Its address on the network.
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

// R15: the card's registers, R11: frames to send, R12: frames sent, R13: sum of what came, R14:
// frames that came, R8: place in the receive ring.
std::arch::global_asm!(
    ".pushsection .rodata",
    ".global nic_guest_start",
    "nic_guest_start:",
    "lea r11, [rip + 99f]",
    // Which slot has the card.
    "mov ecx, 1",
    "1: mov esi, ecx",
    "shl esi, 11",
    "or esi, 0x80000000",
    "mov eax, esi",
    "mov edx, 0xcf8",
    "out dx, eax",
    "mov edx, 0xcfc",
    "in eax, dx",
    "cmp eax, 0x100e8086",
    "je 3f",
    "inc ecx",
    "cmp ecx, 32",
    "jb 1b",
    "2: hlt",
    "jmp 2b",
    // It decodes its memory and may reach the guest's.
    "3: lea eax, [rsi + 4]",
    "mov edx, 0xcf8",
    "out dx, eax",
    "mov edx, 0xcfc",
    "in eax, dx",
    "or eax, 6",
    "out dx, eax",
    "lea eax, [rsi + 0x10]",
    "mov edx, 0xcf8",
    "out dx, eax",
    "mov edx, 0xcfc",
    "in eax, dx",
    "and eax, 0xfffffff0",
    "mov r15d, eax",
    // The GiB below 4 GiB is mapped, in a page directory at 0x1f0000.
    "mov edi, 0x1f0000",
    "mov eax, 0xc0000083",
    "mov ecx, 512",
    "4: mov [rdi], rax",
    "add rax, 0x200000",
    "add rdi, 8",
    "dec ecx",
    "jnz 4b",
    "mov rax, cr3",
    "and rax, -4096",
    "mov rax, [rax]",
    "and rax, -4096",
    "mov qword ptr [rax + 24], 0x1f0003",
    // Rings of eight descriptors.
    "mov edi, 0x200000",
    "mov eax, 0x220000",
    "mov ecx, 8",
    "5: mov [rdi], rax",
    "mov qword ptr [rdi + 8], 0",
    "add rax, 2048",
    "add rdi, 16",
    "dec ecx",
    "jnz 5b",
    "mov dword ptr [r15 + 0x2800], 0x200000",
    "mov dword ptr [r15 + 0x2804], 0",
    "mov dword ptr [r15 + 0x2808], 128",
    "mov dword ptr [r15 + 0x2810], 0",
    "mov dword ptr [r15 + 0x2818], 7",
    "mov dword ptr [r15 + 0x3800], 0x201000",
    "mov dword ptr [r15 + 0x3804], 0",
    "mov dword ptr [r15 + 0x3808], 128",
    "mov dword ptr [r15 + 0x3810], 0",
    "mov dword ptr [r15 + 0x3818], 0",
    // Link up; receive everything; transmit.
    "mov dword ptr [r15], 0x40",
    "mov dword ptr [r15 + 0x100], 0x801a",
    "mov dword ptr [r15 + 0x400], 0x10a",
    "xor r12d, r12d",
    "xor r13d, r13d",
    "xor r14d, r14d",
    "xor r8d, r8d",
    // The next frame into its buffer.
    "6: mov r9d, r12d",
    "and r9d, 7",
    "mov edi, r9d",
    "shl edi, 11",
    "add edi, 0x230000",
    "mov esi, r12d",
    "and esi, 1",
    "shl esi, 6",
    "add rsi, r11",
    "mov ecx, 8",
    "7: mov rax, [rsi]",
    "mov [rdi], rax",
    "add rsi, 8",
    "add rdi, 8",
    "dec ecx",
    "jnz 7b",
    "test r12d, 1",
    "jnz 8f",
    "mov [rdi - 16], r12",
    // Its descriptor: end of packet, frame check sequence, report status.
    "8: mov edi, r9d",
    "shl edi, 4",
    "add edi, 0x201000",
    "mov eax, r9d",
    "shl eax, 11",
    "add eax, 0x230000",
    "mov [rdi], rax",
    "mov eax, 0x0b000040",
    "mov [rdi + 8], rax",
    "mov eax, r9d",
    "inc eax",
    "and eax, 7",
    "mov [r15 + 0x3818], eax",
    "9: test byte ptr [rdi + 12], 1",
    "jnz 12f",
    "pause",
    "jmp 9b",
    "12: inc r12",
    "mov edx, 0x500",
    "mov eax, r12d",
    "out dx, eax",
    // What came.
    "13: mov edi, r8d",
    "shl edi, 4",
    "add edi, 0x200000",
    "test byte ptr [rdi + 12], 1",
    "jz 6b",
    "mov rsi, [rdi]",
    "add r13, [rsi + 48]",
    "rol r13, 7",
    "mov qword ptr [rdi + 8], 0",
    "mov [r15 + 0x2818], r8d",
    "inc r8d",
    "and r8d, 7",
    "inc r14",
    "mov edx, 0x3f8",
    "mov al, 0x52",
    "out dx, al",
    "jmp 13b",
    ".balign 8",
    "99:",
    ".global nic_guest_end",
    "nic_guest_end:",
    ".code64",
    ".popsection",
);

/// The guest's code with its frames; it runs wherever it is loaded below 1 GiB.
pub fn code() -> Vec<u8> {
    unsafe extern "C" {
        #[link_name = "nic_guest_start"]
        static START: u8;
        #[link_name = "nic_guest_end"]
        static END: u8;
    }
    let (start, end) = (&raw const START, &raw const END);
    // SAFETY: both symbols are in this program's read-only data, the second behind the first.
    let code = unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) };
    [code, &arp_request()[..], &tcp_syn()[..]].concat()
}

fn frame(to: [u8; 6], kind: u16, content: &[u8]) -> [u8; FRAME_BYTES] {
    let mut frame = [0; FRAME_BYTES];
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&MAC);
    frame[12..14].copy_from_slice(&kind.to_be_bytes());
    frame[14..14 + content.len()].copy_from_slice(content);
    frame
}

/// Who has 10.0.2.2? 10.0.2.15 asks.
fn arp_request() -> [u8; FRAME_BYTES] {
    let mut content = vec![0, 1, 8, 0, 6, 4, 0, 1];
    content.extend(MAC);
    content.extend([10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
    frame([0xff; 6], 0x0806, &content)
}

/// A connection to the gateway's port 7.
fn tcp_syn() -> [u8; FRAME_BYTES] {
    let mut ip = vec![0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0];
    ip.extend([10, 0, 2, 15, 10, 0, 2, 2]);
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut tcp = vec![
        0x9c, 0x40, 0, 7, 0, 0, 0x10, 0, 0, 0, 0, 0, 0x50, 2, 0x20, 0,
    ];
    tcp.extend([0; 4]);
    let pseudo = [&[10, 0, 2, 15, 10, 0, 2, 2, 0, 6, 0, 20], &tcp[..]].concat();
    let sum = checksum(&pseudo);
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    frame([0x52, 0x55, 10, 0, 2, 2], 0x0800, &[ip, tcp].concat())
}

/// The Internet's checksum of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2);
    let sum: u32 = words
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}
