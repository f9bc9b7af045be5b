//! Faults that stop a call, which there are as orders of their own too.

use recovery::fault::FaultKind;

use super::*;

#[test]
fn code_of_a_fault_is_put_where_there_is_room_for_it() {
    use iced_x86::code_asm::*;
    let code = made(|asm| {
        asm.push(rbx)?;
        asm.mov(eax, ebx)?;
        asm.mov(eax, dword_ptr(rdi + 8))?;
        asm.mov(dword_ptr(rdi + 8), 1)?;
        asm.jmp(address("__x86_return_thunk"))
    });
    for kind in FaultKind::ALL {
        let same = Kind::from_name(kind.name()).unwrap();
        let room = kind.code().len();
        for site in sites(&function(&code)) {
            let change = mutate(&function(&code), same, site.offset, 7);
            assert_eq!(change.is_ok(), site.kinds.contains(&same), "{site:?}");
            if let Ok(change) = change {
                keeps_what_is_around(&code, &change);
                assert!(change.new.starts_with(kind.code()) && change.replaces_whole);
            }
        }
        let fits = fitting(&code, same).len();
        let lengths = [1, 2, 3, 7, 5];
        let enough = lengths.into_iter().filter(|len| *len >= room).count();
        assert_eq!(fits, enough, "{kind:?}");
    }
}
