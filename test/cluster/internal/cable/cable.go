package cable

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/culvert-dev/culvert/test/cluster/internal/network"
)

// Devices in wan.
const (
	bridge = network.HomeBridge
	port   = network.LaptopPort
	tap    = "wire" // stands in for the port in the bridge
)

// cable is the process's state.
type cable struct {
	dir    string
	faults atomic.Pointer[Faults]
	copies []*os.File // open while frames are copied
	broken chan error
}

// Run is the cable's process, in the namespaces of wan. It follows the orders
// in wan's state directory for ever.
func Run(dir string) error {
	c := &cable{dir: dir, broken: make(chan error, 4)}
	done := -1
	for {
		o, err := readOrder(orderFile(dir))
		if err != nil {
			return err
		}
		if o.Number != done {
			if err := c.apply(o.Faults); err != nil {
				return err
			}
			if err := writeOrder(answerFile(dir), o); err != nil {
				return err
			}
			done = o.Number
			fmt.Printf("%s %s\n", time.Now().Format(time.RFC3339), o.Faults)
		}
		select {
		case err := <-c.broken:
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (c *cable) apply(f Faults) error {
	c.faults.Store(&f)
	if f.Perfect() {
		return c.plain()
	}
	if c.copies != nil {
		return nil
	}
	return c.copy()
}

// plain puts the laptop's port into the bridge.
func (c *cable) plain() error {
	for _, f := range c.copies {
		f.Close() // the TAP device ends with it
	}
	c.copies = nil
	return setMaster(port, bridge)
}

// copy takes the port off the bridge and starts to copy its frames.
func (c *cable) copy() error {
	wire, err := openTAP(tap)
	if err != nil {
		return err
	}
	// A bridge port needs no addresses; with IPv6 it would speak for itself.
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+tap+"/disable_ipv6", []byte("1"), 0o644); err != nil {
		return fmt.Errorf("keep IPv6 off %s: %w", tap, err)
	}
	if err := setMaster(tap, bridge); err != nil {
		return err
	}
	link, err := netlink.LinkByName(tap)
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("bring up %s: %w", tap, err)
	}
	if err := setMaster(port, ""); err != nil {
		return err
	}
	laptop, err := openPort(port)
	if err != nil {
		return err
	}
	c.copies = []*os.File{wire, laptop}
	go c.carry(laptop, wire)
	go c.carry(wire, laptop)
	return nil
}

// carry is one direction of the cable.
func (c *cable) carry(from, to *os.File) {
	type parcel struct {
		frame []byte
		at    time.Time
	}
	queue := make(chan parcel, 20000)
	defer close(queue)
	go func() {
		for p := range queue {
			if d := time.Until(p.at); d > 100*time.Microsecond { // a sleep takes up to a millisecond
				time.Sleep(d)
			}
			to.Write(p.frame) // an error is a lost frame: the device is down or full
		}
	}()
	var s shaper
	buf := make([]byte, 70000)
	for {
		n, err := from.Read(buf)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil {
			c.broken <- fmt.Errorf("read frames of %s: %w", from.Name(), err)
			return
		}
		if at, ok := s.schedule(*c.faults.Load(), time.Now(), n, rand.Float64()); ok {
			select {
			case queue <- parcel{append([]byte(nil), buf[:n]...), at}:
			default: // full: dropped
			}
		}
	}
}

// setMaster puts a device into a bridge, or with "" takes it out of any.
func setMaster(device, master string) error {
	link, err := netlink.LinkByName(device)
	if err != nil {
		return fmt.Errorf("find device %s: %w", device, err)
	}
	if master == "" {
		err = netlink.LinkSetNoMaster(link)
	} else {
		var m netlink.Link
		if m, err = netlink.LinkByName(master); err == nil {
			err = netlink.LinkSetMaster(link, m)
		}
	}
	if err != nil {
		return fmt.Errorf("set the bridge of %s to %q: %w", device, master, err)
	}
	return nil
}
