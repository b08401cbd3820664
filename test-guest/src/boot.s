# Everything that runs in ring 0: the PVH entry (Xen x86/HVM direct boot ABI), the start of the second processor, the
# interrupt stubs and four service gates. Kept small, because ring 0 may be emulated, instruction by instruction.
#
# Selectors (GDT below): 0x08 code, 0x10 data, 0x1b ring-3 data, 0x23 ring-3 code, 0x28 and 0x38 TSS of processor 0 and 1,
# 0x48 32-bit code, which the second processor passes through.

.set USER_CODE, 0x23
.set USER_DATA, 0x1b
# IOPL 3, interrupts on.
.set USER_FLAGS, 0x3202
.set USER_FLAGS_MASKED, 0x3002
.set TRAMPOLINE, 0x8000

.section .note.pvh, "a", @note
    .long 4, 8, 18              # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

.section .boot.text, "ax", @progbits

# 32-bit protected mode, flat segments, paging off, ebx = hvm_start_info.
.code32
.global pvh_entry
pvh_entry:
    cld
    mov dword ptr [start_info], ebx
    # Identity map of the first GiB in pages of 2 MiB: present, writable, user. Ring 3 maps the rest.
    mov edi, offset page_directory
    mov eax, 0x87
    mov ecx, 512
1:  mov dword ptr [edi], eax
    add eax, 0x200000
    add edi, 8
    dec ecx
    jnz 1b
    mov eax, offset page_directory + 7
    mov dword ptr [pdpt], eax
    mov eax, offset pdpt + 7
    mov dword ptr [pml4], eax
    # TSS descriptors: the base is scattered.
    mov eax, offset tss_0
    mov word ptr [gdt + 0x2a], ax
    shr eax, 16
    mov byte ptr [gdt + 0x2c], al
    mov byte ptr [gdt + 0x2f], ah
    mov eax, offset tss_1
    mov word ptr [gdt + 0x3a], ax
    shr eax, 16
    mov byte ptr [gdt + 0x3c], al
    mov byte ptr [gdt + 0x3f], ah
    # The two 8259, where there are any, stay silent.
    mov al, 0xff
    out 0x21, al
    out 0xa1, al
    lgdt [gdt_pointer]
    mov esi, offset long_0
    jmp enter_long

# The second processor, from the trampoline: 32-bit protected mode with our GDT.
secondary_32:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esi, offset long_1

# Long mode on; then to `esi`.
enter_long:
    mov eax, 0x620              # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080         # EFER
    rdmsr
    or eax, 0x100               # LME
    wrmsr
    mov eax, 0x80000033         # PG, NE, ET, MP, PE
    mov cr0, eax
    .byte 0xea                  # jmp 0x08:1f
    .long 1f
    .word 0x08
.code64
1:  xor eax, eax
    mov ds, ax
    mov es, ax
    mov fs, ax
    mov gs, ax
    mov ss, ax
    lidt [idt_pointer]
    jmp rsi

long_0:
    mov ax, 0x28
    ltr ax
    mov rsp, offset kernel_stack_0_end
    mov rdx, offset user_stack_0_end
    mov rcx, offset guest_main
    jmp enter_user
long_1:
    mov ax, 0x38
    ltr ax
    mov rsp, offset kernel_stack_1_end
    mov rdx, offset user_stack_1_end
    mov rcx, offset secondary_main
# To ring 3 at rcx with stack rdx. As after a call, the stack is 8 off alignment.
enter_user:
    sub rdx, 8
    push USER_DATA
    push rdx
    push USER_FLAGS
    push USER_CODE
    push rcx
    iretq

# The gate from ring 3, entered by `int3`: a breakpoint is the one software interrupt that works where ring 0 is emulated
# (others end in #UD there). r11d says what is wanted.
.global gate
gate:
    cmp r11d, 1
    je 2f
    ja 3f
    # 0: sleep until an interrupt, unless the word at [rdi] says that one has come. Interrupts are off on entry, and `sti`
    # takes effect after `hlt` has begun, so that none is lost in between.
    cmp dword ptr [rdi], 0
    jne 1f
    sti
    hlt
1:  iretq
2:  cpuid
    iretq
3:  cmp r11d, 3
    je 4f
    rdmsr
    iretq
4:  wrmsr
    iretq

# Interrupt stubs: note it for the processor, count it, end it. Two sorts, for x2APIC and for the memory-mapped APIC.
.macro interrupt name, pending, count
.global \name\()_x2apic
\name\()_x2apic:
    push rax
    push rcx
    push rdx
    mov dword ptr [\pending], 1
    inc qword ptr [\count]
    mov ecx, 0x80b
    xor eax, eax
    xor edx, edx
    wrmsr
    pop rdx
    pop rcx
    pop rax
    iretq
.global \name\()_xapic
\name\()_xapic:
    push rax
    mov dword ptr [\pending], 1
    inc qword ptr [\count]
    mov eax, 0xfee000b0
    mov dword ptr [rax], 0
    pop rax
    iretq
.endm

interrupt irq_device, pending_0, count_device
interrupt irq_timer_0, pending_0, count_timer_0
interrupt irq_timer_1, pending_1, count_timer_1
interrupt irq_wake_1, pending_1, count_wake_1

.global irq_spurious
irq_spurious:
    iretq

# Exceptions: 16 bytes of entry each, so that ring 3 can compute their addresses.
.global exceptions
.balign 16
exceptions:
.set vector, 0
.rept 32
    .balign 16
    .if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30
    .else
    push 0
    .endif
    push vector
    jmp exception
    .set vector, vector + 1
.endr

# Saves what there is to say and continues in ring 3, on a stack of its own; a second exception stops the processor.
exception:
    push rax
    cmp dword ptr [exception_taken], 0
    jne 1f
    mov dword ptr [exception_taken], 1
    mov rax, cr2
    mov qword ptr [exception_record + 40], rax
    mov rax, qword ptr [rsp + 8]
    mov qword ptr [exception_record], rax
    mov rax, qword ptr [rsp + 16]
    mov qword ptr [exception_record + 8], rax
    mov rax, qword ptr [rsp + 24]
    mov qword ptr [exception_record + 16], rax
    mov rax, qword ptr [rsp + 32]
    mov qword ptr [exception_record + 24], rax
    mov rax, qword ptr [rsp + 48]
    mov qword ptr [exception_record + 32], rax
    add rsp, 64
    push USER_DATA
    push offset exception_stack_end - 8
    push USER_FLAGS_MASKED
    push USER_CODE
    push offset exception_main
    iretq
1:  cli
    hlt
    jmp 1b

# Where the second processor starts, in real mode; copied to TRAMPOLINE.
.global trampoline
.global trampoline_end
.code16
trampoline:
    cli
    xor ax, ax
    mov ds, ax
    .byte 0x66, 0x0f, 0x01, 0x16    # lgdt, 32-bit base, [disp16]
    .word TRAMPOLINE + (trampoline_gdt - trampoline)
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xea                # jmp 0x48:secondary_32
    .long secondary_32
    .word 0x48
trampoline_gdt:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:
.code64

.section .data.boot, "aw", @progbits
.balign 16
.global gdt
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    # 0x08 ring-0 code, 64 bits
    .quad 0x00cf93000000ffff    # 0x10 ring-0 data
    .quad 0x00cff3000000ffff    # 0x18 ring-3 data
    .quad 0x00affb000000ffff    # 0x20 ring-3 code, 64 bits
    .quad 0x0000890000000000 + (tss_end - tss_0 - 1), 0 # 0x28 TSS of processor 0
    .quad 0x0000890000000000 + (tss_end - tss_1 - 1), 0 # 0x38 TSS of processor 1
    .quad 0x00cf9b000000ffff    # 0x48 ring-0 code, 32 bits
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
.balign 8
idt_pointer:
    .word 256 * 16 - 1
    .quad idt

# TSS: rsp0 and the I/O permission bitmap, which both share and which allows all ports. IOPL 3 alone would do on a real
# processor, but a monitor that emulates `iretq` may lose it.
.balign 16
tss_1:
    .long 0
    .quad kernel_stack_1_end
    .fill 90, 1, 0
    .word io_bitmap - tss_1
tss_0:
    .long 0
    .quad kernel_stack_0_end
    .fill 90, 1, 0
    .word io_bitmap - tss_0
io_bitmap:
    .fill 8192, 1, 0
    .byte 0xff
tss_end:

.section .bss.boot, "aw", @nobits
.balign 4096
.global pml4
pml4: .skip 4096
.global pdpt
pdpt: .skip 4096
page_directory: .skip 4096
.global idt
idt: .skip 4096
.skip 4096
kernel_stack_0_end:
.skip 4096
kernel_stack_1_end:
.skip 16384
exception_stack_end:
.skip 262144
user_stack_0_end:
.skip 65536
user_stack_1_end:
.global start_info
start_info: .skip 8
.global exception_record
exception_record: .skip 48
exception_taken: .skip 8
# What stubs write, a cache line per processor.
.balign 64
.global pending_0
pending_0: .skip 8
.global count_device
count_device: .skip 8
.global count_timer_0
count_timer_0: .skip 8
.balign 64
.global pending_1
pending_1: .skip 8
.global count_timer_1
count_timer_1: .skip 8
.global count_wake_1
count_wake_1: .skip 8
.balign 64
