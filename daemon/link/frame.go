package link

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// A message on the socket is its length (4 bytes, big endian) and that many
// bytes of JSON. Descriptors ride with the length: the kernel never merges
// reads across them (unix(7), SCM_RIGHTS), so they cannot slip to a neighbour.

const lengthSize = 4

var (
	errTooLong  = fmt.Errorf("message longer than %d bytes", MaxMessage)
	errTooMany  = errors.New("more descriptors than wanted")
	errEmptyMsg = errors.New("empty message")
)

// readMessage returns the next message; its error wraps io.EOF if the peer
// closed its end between two messages.
func (c *Conn) readMessage() (m message, err error) {
	var files []*os.File
	defer func() {
		if err != nil {
			closeFiles(files)
			m.files = nil
		}
	}()
	var head [lengthSize]byte
	if err := c.readFull(head[:], &files); err != nil {
		return m, fmt.Errorf("reading from the link: %w", err)
	}
	n := int(binary.BigEndian.Uint32(head[:]))
	if n == 0 {
		return m, fmt.Errorf("reading from the link: %w", errEmptyMsg)
	}
	if n > MaxMessage {
		return m, fmt.Errorf("reading from the link: %w", errTooLong)
	}
	// The buffer grows with what has come, not with what was announced.
	var body []byte
	for len(body) < n {
		at := len(body)
		body = append(body, make([]byte, min(n-at, 32<<10))...)
		if err := c.readFull(body[at:], &files); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return m, fmt.Errorf("reading from the link: %w", err)
		}
	}
	if err := json.Unmarshal(body, &m); err != nil {
		return m, fmt.Errorf("decoding a message of the link: %w", err)
	}
	m.files = files
	return m, nil
}

// readFull fills p and adds the descriptors that come along to files. The error
// is io.EOF only if nothing was read.
func (c *Conn) readFull(p []byte, files *[]*os.File) error {
	var oob []byte
	if c.maxFiles > 0 {
		oob = make([]byte, rightsSpace(c.maxFiles))
	}
	for at := 0; at < len(p); {
		n, oobn, _, _, err := c.sock.ReadMsgUnix(p[at:], oob)
		if oobn > 0 {
			got, rerr := receiveRights(oob[:oobn])
			*files = append(*files, got...)
			if rerr != nil {
				return rerr
			}
			if len(*files) > c.maxFiles {
				return errTooMany
			}
		}
		if n == 0 && (err == nil || errors.Is(err, io.EOF)) {
			if at == 0 {
				return io.EOF
			}
			return io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		at += n
	}
	return nil
}

// write sends one message whole. A peer that does not read is closed.
func (c *Conn) write(m message) error {
	body, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("encoding a message of the link: %w", err)
	}
	if len(body) > MaxMessage {
		return errTooLong
	}
	var head [lengthSize]byte
	binary.BigEndian.PutUint32(head[:], uint32(len(body)))

	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	c.sock.SetWriteDeadline(time.Now().Add(writeTimeout))
	err = withRights(m.files, func(oob []byte) error {
		n, _, err := c.sock.WriteMsgUnix(head[:], oob, nil)
		if err == nil && n < len(head) {
			_, err = c.sock.Write(head[n:])
		}
		return err
	})
	if err == nil {
		_, err = c.sock.Write(body)
	}
	if err != nil {
		// Half a message may be out: nothing sensible can follow it.
		c.Close()
		return fmt.Errorf("%w: %w", ErrClosed, err)
	}
	return nil
}
