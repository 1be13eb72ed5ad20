package carrier

import "encoding/binary"

// tell acknowledges what has arrived, unless data told it already. It is not the
// goroutine that reads, for the reason that answer is not.
func (s *Stream) tell() {
	defer s.wg.Done()
	for {
		select {
		case <-s.done:
			return
		case <-s.acks:
		}
		s.wmu.Lock()
		s.appendAck()
		err := s.flush()
		s.wmu.Unlock()
		if err != nil {
			return
		}
	}
}

// appendAck adds an acknowledgement to s.out if one is due; s.wmu is held.
func (s *Stream) appendAck() {
	if s.dataIn.Load() != s.ackOut && !s.moved {
		s.addAck()
	}
}

// addAck adds an acknowledgement to s.out; s.wmu is held.
func (s *Stream) addAck() {
	s.ackOut = s.dataIn.Load()
	s.ackAt.Store(s.ackOut)
	s.out = binary.BigEndian.AppendUint64(appendHeader(s.out, frameAck, 8), s.ackOut)
}

// follow sends an acknowledgement whether it is due or not, see nudgeFrom.
func (s *Stream) follow() {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	s.burst = false
	if s.moved || s.Err() != nil || s.writing {
		return
	}
	s.addAck()
	_ = s.flush()
}

// arrived accounts for n bytes of data frames.
func (s *Stream) arrived(n int) {
	if n == 0 {
		return
	}
	if due := s.dataIn.Add(uint64(n)) - s.ackAt.Load(); due >= ackBytes {
		s.acknowledge()
	} else if s.armed.CompareAndSwap(false, true) {
		s.late.Reset(ackDelay)
	}
}

func (s *Stream) acknowledge() {
	select {
	case s.acks <- struct{}{}:
	default:
	}
}
