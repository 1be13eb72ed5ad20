package router

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A hop that does not answer is asked as often as we want, and gets what was
// queued for it when it does answer.
func TestAskNextHops(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	run(t, "ip", "link", "add", "lan0", "type", "veth", "peer", "name", "far0")
	run(t, "ip", "link", "set", "lan0", "up")
	run(t, "ip", "link", "set", "far0", "up")
	run(t, "ip", "addr", "add", "192.0.2.2/24", "dev", "lan0")
	run(t, "ip", "route", "add", "default", "via", "192.0.2.1")
	far, err := net.InterfaceByName("far0")
	if err != nil {
		t.Fatal(err)
	}
	all := binary.BigEndian.Uint16([]byte{unix.ETH_P_ALL & 0xff, unix.ETH_P_ALL >> 8})
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, int(all))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: far.Index}); err != nil {
		t.Fatal(err)
	}
	tv := unix.NsecToTimeval(int64(20 * time.Millisecond))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	// count reads frames for a time, with do every 100 ms.
	var question []byte
	count := func(d time.Duration, do func()) (asked, datagrams int) {
		buf := make([]byte, 2048)
		next := time.Now()
		for end := time.Now().Add(d); time.Now().Before(end); {
			if time.Now().After(next) {
				do()
				next = next.Add(100 * time.Millisecond)
			}
			n, from, err := unix.Recvfrom(fd, buf, 0)
			if l, ok := from.(*unix.SockaddrLinklayer); err != nil || n < 42 || ok && l.Pkttype == unix.PACKET_OUTGOING {
				continue
			}
			switch binary.BigEndian.Uint16(buf[12:]) {
			case unix.ETH_P_ARP:
				asked++
				question = append(question[:0], buf[:42]...)
			case unix.ETH_P_IP:
				datagrams++
			}
		}
		return asked, datagrams
	}
	c, err := net.Dial("udp4", "198.51.100.7:9")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("queued")); err != nil {
		t.Fatal(err)
	}
	to := []netip.Addr{netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("198.51.100.8"), netip.MustParseAddr("2001:db8::1")}
	asked, early := count(2*time.Second, func() {
		if err := AskNextHops(to); err != nil {
			t.Error(err)
		}
	})
	if asked < 10 || asked > 25 || early != 0 {
		t.Errorf("the gateway was asked %d times in 2 s, want about 20; %d datagrams", asked, early)
	}

	// The answer: from the asked, to the one who asks (RFC 826).
	answer := append([]byte(nil), question...)
	copy(answer[0:6], question[6:12])
	copy(answer[6:12], far.HardwareAddr)
	answer[21] = 2
	copy(answer[22:28], far.HardwareAddr)
	copy(answer[28:32], question[38:42])
	copy(answer[32:38], question[22:28])
	copy(answer[38:42], question[28:32])
	if err := unix.Sendto(fd, answer, 0, &unix.SockaddrLinklayer{Ifindex: far.Index, Halen: 6}); err != nil {
		t.Fatal(err)
	}
	asked, arrived := count(500*time.Millisecond, func() {
		if err := AskNextHops(to); err != nil {
			t.Error(err)
		}
	})
	if arrived != 1 || asked > 1 {
		t.Errorf("after the answer %d datagrams arrived and it was asked %d times more", arrived, asked)
	}
}
