//! The private view of a guest's memory, without a VM.

use super::*;
use crate::domain::test_memory;

#[test]
fn private_writes_stay_private_until_published() {
    let shared = test_memory(16);
    let mut view = PrivateView::new(shared.clone()).unwrap();
    shared.write_obj(0x11u8, GuestAddress(0x3000)).unwrap();
    view.private_page_mut(Pfn(3)).unwrap()[1] = 0x22;
    assert_eq!(view.private_page(Pfn(3)).unwrap()[..2], [0x11, 0x22]);
    assert_eq!(view.shared_page(Pfn(3)).unwrap()[..2], [0x11, 0]);
    let mut second = PageMask::EMPTY;
    second.insert(1..2);
    view.publish(Pfn(3), &second).unwrap();
    assert_eq!(view.shared_page(Pfn(3)).unwrap()[..2], [0x11, 0x22]);
}

#[test]
fn what_is_written_to_the_guest_by_address_is_marked() {
    let shared = test_memory(16);
    let mut view = PrivateView::new(shared.clone()).unwrap();
    let mapping = shared.iter().next().unwrap().get_mmap();
    mapping.bitmap().start();
    let mut first = PageMask::EMPTY;
    first.insert(0..1);
    view.private_page_mut(Pfn(2)).unwrap()[0] = 1;
    view.publish(Pfn(2), &first).unwrap();
    view.shared_page_mut(Pfn(5)).unwrap()[0] = 1;
    view.write_shared_word(0x7008, 1).unwrap();
    view.private_page_mut(Pfn(9)).unwrap()[0] = 1;
    view.refresh(Pfn(9)).unwrap();
    let mut marked = Vec::new();
    mapping.bitmap().take(|page| marked.push(page));
    assert_eq!(marked, [2, 5, 7]);
}

#[test]
fn dropped_pages_follow_the_guest_again() {
    let shared = test_memory(16);
    let mut view = PrivateView::new(shared.clone()).unwrap();
    for pfn in [2, 3, 4, 9] {
        view.private_page_mut(Pfn(pfn)).unwrap()[0] = 0xee;
    }
    let calls = view.drop_pages(&[Pfn(2), Pfn(3), Pfn(4), Pfn(9)]).unwrap();
    assert_eq!(calls, 2, "one call for each run");
    shared.write_obj(0x77u8, GuestAddress(0x3000)).unwrap();
    assert_eq!(view.private_page(Pfn(3)).unwrap()[0], 0x77);
    assert_eq!(view.private_page(Pfn(9)).unwrap()[0], 0);
}

#[test]
fn refreshed_copy_equals_the_guests_page() {
    let shared = test_memory(4);
    let mut view = PrivateView::new(shared.clone()).unwrap();
    view.private_page_mut(Pfn(1)).unwrap().fill(9);
    shared.write_obj(5u8, GuestAddress(0x1008)).unwrap();
    view.refresh(Pfn(1)).unwrap();
    assert_eq!(
        view.private_page(Pfn(1)).unwrap(),
        view.shared_page(Pfn(1)).unwrap()
    );
}

#[test]
fn what_a_device_writes_meanwhile_is_no_change_of_ps() {
    let shared = test_memory(4);
    shared.write_obj(0x1111u16, GuestAddress(0x1000)).unwrap();
    let mut view = PrivateView::new(shared.clone()).unwrap();
    view.keep_bases();
    view.begin_copy(Pfn(1)).unwrap();
    view.private_page_mut(Pfn(1)).unwrap()[8] = 0x22;
    shared.write_obj(0x33u8, GuestAddress(0x1fff)).unwrap();
    // A copy that is known of is not made again.
    view.begin_copy(Pfn(1)).unwrap();
    let changes = view.changes(Pfn(1)).unwrap();
    assert!(changes.runs().eq(std::iter::once(8..9)));
    view.publish(Pfn(1), &changes).unwrap();
    let now = view.copy_shared(Pfn(1)).unwrap();
    assert_eq!((now[0], now[8], now[0xfff]), (0x11, 0x22, 0x33));
    // Without it the byte would have gone.
    assert_eq!(view.private_page(Pfn(1)).unwrap()[0xfff], 0);
    assert_eq!(view.before(Pfn(1)).unwrap()[8], 0);
    view.refresh(Pfn(1)).unwrap();
    assert_eq!(view.private_page(Pfn(1)).unwrap()[0xfff], 0x33);
    assert!(view.changes(Pfn(1)).unwrap().is_empty());
    // A page that is dropped follows the guest's, and its next copy begins anew.
    view.drop_pages(&[Pfn(1)]).unwrap();
    shared.write_obj(0x44u8, GuestAddress(0x1002)).unwrap();
    view.begin_copy(Pfn(1)).unwrap();
    assert_eq!(view.before(Pfn(1)).unwrap()[2], 0x44);
}

#[test]
fn what_a_device_has_written_is_taken_over_where_p_has_not() {
    let shared = test_memory(4);
    let mut view = PrivateView::new(shared.clone()).unwrap();
    view.keep_bases();
    view.begin_copy(Pfn(1)).unwrap();
    view.private_page_mut(Pfn(1)).unwrap()[3] = 1;
    shared.write_obj([7u8; 8], GuestAddress(0x1000)).unwrap();
    shared.write_obj(9u8, GuestAddress(0x1800)).unwrap();
    view.take_over(Pfn(1)).unwrap();
    let page = view.private_page(Pfn(1)).unwrap();
    assert_eq!(page[..8], [7, 7, 7, 1, 7, 7, 7, 7]);
    assert_eq!(page[0x800], 9);
    let changes = view.changes(Pfn(1)).unwrap();
    assert!(changes.runs().eq(std::iter::once(3..4)));
    // Nothing is known of this page.
    view.take_over(Pfn(2)).unwrap();
}

#[test]
fn addresses_outside_memory_are_refused() {
    let mut view = PrivateView::new(test_memory(4)).unwrap();
    assert!(view.private_page(Pfn(4)).is_err());
    assert!(view.shared_page(Pfn(u64::MAX)).is_err());
    assert!(view.publish(Pfn(4), &PageMask::EMPTY).is_err());
    assert!(view.drop_pages(&[Pfn(99)]).is_err());
}
