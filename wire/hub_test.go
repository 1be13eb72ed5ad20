package wire

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	wgtun "golang.zx2c4.com/wireguard/tun"
)

// cable is a tun.Device: what is put into in is read, and what is written is
// given to out.
type cable struct {
	in     chan []byte
	out    func([]byte)
	events chan wgtun.Event
	closed chan struct{}
	once   sync.Once
}

func newCable(out func([]byte)) *cable {
	// No event that it is up: WireGuard would open its sockets on a thread that is
	// not in the test's namespace.
	return &cable{in: make(chan []byte), out: out, events: make(chan wgtun.Event), closed: make(chan struct{})}
}

func (c *cable) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	select {
	case p := <-c.in:
		sizes[0] = copy(bufs[0][offset:], p)
		return 1, nil
	case <-c.closed:
		return 0, os.ErrClosed
	}
}

func (c *cable) Write(bufs [][]byte, offset int) (int, error) {
	for _, b := range bufs {
		c.out(b[offset:])
	}
	return len(bufs), nil
}

func (c *cable) File() *os.File             { return nil }
func (c *cable) MTU() (int, error)          { return 1420, nil }
func (c *cable) Name() (string, error)      { return "cable", nil }
func (c *cable) Events() <-chan wgtun.Event { return c.events }
func (c *cable) BatchSize() int             { return conn.IdealBatchSize }
func (c *cable) Close() error {
	c.once.Do(func() { close(c.closed); close(c.events) })
	return nil
}

// ipPacket is an IPv4 packet of no protocol in particular.
func ipPacket(from, to netip.Addr, size int) []byte {
	b := make([]byte, size)
	b[0], b[8] = 0x45, 64
	binary.BigEndian.PutUint16(b[2:], uint16(size))
	copy(b[12:], from.AsSlice())
	copy(b[16:], to.AsSlice())
	return b
}

// stock is a peer of a hub: a WireGuard device as it comes, on a cable.
type stock struct {
	*cable
	key  Key
	addr netip.Addr
	got  chan int // sizes of what arrives
	dev  *device.Device
}

// join makes a peer in the hub's namespace, or only its key if quiet.
func join(t *testing.T, n *namespace, h *Hub, last byte, quiet bool) *stock {
	t.Helper()
	s := &stock{key: NewPrivateKey(), addr: netip.AddrFrom4([4]byte{198, 18, 0, last}), got: make(chan int, 1000)}
	s.cable = newCable(func(b []byte) {
		select {
		case s.got <- len(b):
		default:
		}
	})
	if err := h.Add(s.key.Public(), []netip.Addr{s.addr}); err != nil {
		t.Fatal(err)
	}
	if quiet {
		return s
	}
	server := h.PublicKey()
	s.dev = device.NewDevice(s.cable, conn.NewStdNetBind(), device.NewLogger(device.LogLevelSilent, ""))
	t.Cleanup(s.dev.Close)
	n.do(t, func() error {
		if err := s.dev.IpcSet(fmt.Sprintf("private_key=%s\npublic_key=%s\nendpoint=127.0.0.1:%d\nallowed_ip=0.0.0.0/0\n",
			hex.EncodeToString(s.key[:]), hex.EncodeToString(server[:]), h.Port())); err != nil {
			return err
		}
		return s.dev.Up()
	})
	return s
}

func newHub(t *testing.T, n *namespace, d wgtun.Device) *Hub {
	t.Helper()
	var h *Hub
	n.do(t, func() (err error) {
		h, err = NewHub(HubConfig{Device: d, PrivateKey: NewPrivateKey()})
		return err
	})
	t.Cleanup(h.Close)
	return h
}

var cluster = netip.AddrFrom4([4]byte{10, 0, 0, 1})

func (v *valve) inside() (in int, out map[uint32]int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	out = map[uint32]int{}
	for tag, p := range v.byTag {
		out[tag] = p.inside
	}
	return v.in, out
}

// TestHubBoundsInwards: a peer that sends faster than the device takes is held
// to the bound, and nothing of it stays counted.
func TestHubBoundsInwards(t *testing.T) {
	n := newNamespace(t)
	arrived := make(chan struct{}, 1<<20)
	gate := make(chan struct{})
	h := newHub(t, n, newCable(func([]byte) { <-gate; arrived <- struct{}{} }))
	p := join(t, n, h, 2, false)
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for range 20_000 {
			select {
			case p.in <- ipPacket(p.addr, cluster, 1400):
			case <-p.closed:
				return
			}
		}
	}()
	most := 0
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		in, _ := h.valve.inside()
		most = max(most, in)
	}
	// Two sockets, a batch each, may be let in together.
	if most < valveIn/2 || most > valveIn+2*conn.IdealBatchSize {
		t.Errorf("%d packets were inside, want about %d", most, valveIn)
	}
	close(gate)
	select {
	case <-sent:
	case <-time.After(20 * time.Second):
		t.Fatal("the peer's packets are not taken")
	}
	waitFor(t, func() bool { in, _ := h.valve.inside(); return in == 0 })
	for len(arrived) > 0 {
		<-arrived
	}
	waitFor(t, func() bool {
		p.in <- ipPacket(p.addr, cluster, 100)
		return len(arrived) > 0
	})
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatal("not so after 10 s")
}

// TestHubPeerAway: what is for a peer that is away is dropped above its bound and
// keeps nobody waiting; when it comes, it gets what is sent then.
func TestHubPeerAway(t *testing.T) {
	n := newNamespace(t)
	d := newCable(func([]byte) {})
	h := newHub(t, n, d)
	here, away := join(t, n, h, 2, false), join(t, n, h, 3, true)
	waitFor(t, func() bool {
		here.in <- ipPacket(here.addr, cluster, 100)
		p, err := h.Peers()
		return err == nil && !p[here.key.Public()].LastHandshake.IsZero()
	})
	slowest := time.Duration(0)
	for i := range 3000 {
		d.in <- ipPacket(cluster, away.addr, 1400)
		if i%30 != 0 {
			continue
		}
		begun := time.Now()
		d.in <- ipPacket(cluster, here.addr, 200)
		select {
		case <-here.got:
		case <-time.After(5 * time.Second):
			t.Fatal("the peer that is here gets nothing")
		}
		slowest = max(slowest, time.Since(begun))
	}
	if slowest > time.Second {
		t.Errorf("the peer that is here waited %v for the one that is not", slowest)
	}
	_, out := h.valve.inside()
	for tag, inside := range out {
		if inside > valveOut+valveBatch+5 {
			t.Errorf("%d packets wait for peer %d, want at most %d", inside, tag, valveOut+valveBatch)
		}
	}

	// Now it comes, as another program with its key.
	if _, err := h.Remove(away.key.Public()); err != nil {
		t.Fatal(err)
	}
	back := join(t, n, h, 3, false)
	waitFor(t, func() bool {
		back.in <- ipPacket(back.addr, cluster, 100)
		d.in <- ipPacket(cluster, back.addr, 300)
		return len(back.got) > 0
	})
}

// TestHubRevived: a peer whose packets waited takes them, and its place is as
// good as new.
func TestHubRevived(t *testing.T) {
	n := newNamespace(t)
	d := newCable(func([]byte) {})
	h := newHub(t, n, d)
	p := join(t, n, h, 2, false)
	for range 1000 { // no handshake yet: the hub does not know where it is
		d.in <- ipPacket(cluster, p.addr, 1400)
	}
	p.in <- ipPacket(p.addr, cluster, 100)
	got := 0
	waitFor(t, func() bool {
		got += len(p.got)
		for len(p.got) > 0 {
			<-p.got
		}
		return got >= valveOut/2
	})
	lost := 0
	for range 2000 {
		d.in <- ipPacket(cluster, p.addr, 1400)
		select {
		case <-p.got:
		case <-time.After(time.Second): // of a socket's buffer, on a busy machine
			lost++
		}
		if lost > 5 {
			t.Fatal("a peer that is back does not get its packets")
		}
	}
	waitFor(t, func() bool { _, out := h.valve.inside(); return out[1] == 0 })
}

// TestHubJunk: what cannot be authentic takes no place in any queue.
func TestHubJunk(t *testing.T) {
	n := newNamespace(t)
	arrived := make(chan struct{}, 1<<20)
	h := newHub(t, n, newCable(func([]byte) { arrived <- struct{}{} }))
	p := join(t, n, h, 2, false)
	p.in <- ipPacket(p.addr, cluster, 100)
	<-arrived
	var c net.Conn
	n.do(t, func() (err error) {
		c, err = net.Dial("udp", fmt.Sprintf("127.0.0.1:%d", h.Port()))
		return err
	})
	defer c.Close()
	junk := func(kind uint32, size int) []byte {
		b := make([]byte, size)
		_, _ = rand.Read(b)
		binary.LittleEndian.PutUint32(b, kind)
		return b
	}
	for range 3000 {
		for kind, size := range map[uint32]int{1: device.MessageInitiationSize, 2: device.MessageResponseSize, 3: device.MessageCookieReplySize, 4: 1400, 77: 500} {
			_, _ = c.Write(junk(kind, size)) // a full socket loses some
		}
	}
	most := 0
	for range 300 {
		waitFor(t, func() bool { // the junk may have filled the socket: again then
			p.in <- ipPacket(p.addr, cluster, 100)
			select {
			case <-arrived:
				return true
			case <-time.After(200 * time.Millisecond):
				return false
			}
		})
		in, _ := h.valve.inside()
		most = max(most, in)
	}
	if most > 50 { // those that were sent again
		t.Errorf("%d packets were counted, where one at a time was sent, junk among them", most)
	}
	bufs, sizes := [][]byte{junk(1, device.MessageInitiationSize), junk(4, 1400), {1, 2, 3}}, []int{device.MessageInitiationSize, 1400, 3}
	h.valve.admit(bufs, sizes)
	if sizes[0] != 0 || sizes[1] != 0 {
		t.Errorf("junk was let in: %v", sizes)
	}
}
